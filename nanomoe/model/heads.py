"""From the last hidden layer to logits.

A head gets the token embedding and returns x -> logits.
"""

from collections.abc import Callable

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanomoe.model.linear import Linear
from nanomoe.ops.matmul import einsum

Head = Callable[
  [Float[Array, 'batch time d_model']], Float[Array, 'batch time vocab']
]


def own(
  embedding: Float[Array, 'vocab d_model'], *, use_bias: bool, precision: str
) -> Head:
  """A matrix of its own."""
  init = nn.initializers.normal(0.02)
  return Linear(embedding.shape[0], init, use_bias, precision, name='head')


def tied(
  embedding: Float[Array, 'vocab d_model'], *, use_bias: bool, precision: str
) -> Head:
  """The tokens' embeddings, and no bias. Press and Wolf 2017."""
  del use_bias

  def head(x):
    rows = x.reshape(-1, x.shape[-1])
    logits = einsum('nd,vd->nv', rows, embedding, precision)
    return logits.reshape(*x.shape[:-1], -1)

  return head


# By whether embeddings are tied.
HEADS = {False: own, True: tied}


def softcap(
  logits: Float[Array, '*rows vocab'], cap: float
) -> Float[Array, '*rows vocab']:
  """cap * tanh(logits / cap): below `cap`; 0: as they are. Gemma 2, 2024."""
  return cap * jnp.tanh(logits / cap) if cap else logits
