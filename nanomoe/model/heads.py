"""Heads: functions from the last activations to logits."""

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanomoe.model.interfaces import Head
from nanomoe.model.linear import Linear
from nanomoe.ops.matmul import einsum


def untied(
  embedding: Float[Array, 'vocab d_model'], *, use_bias: bool, precision: str
) -> Head:
  """Returns a linear layer with a matrix of its own.

  Args:
    embedding: Token embeddings, of which only the shape is used.
    use_bias: Whether the layer has a bias.
    precision: Precision of the matrix product.
  """
  init = nn.initializers.normal(0.02)
  return Linear(embedding.shape[0], init, use_bias, precision, name='head')


def tied(
  embedding: Float[Array, 'vocab d_model'], *, use_bias: bool, precision: str
) -> Head:
  """Returns the product with the token embeddings. Press and Wolf 2017.

  Args:
    embedding: Token embeddings.
    use_bias: Ignored: a tied head has no bias.
    precision: Precision of the matrix product.
  """
  del use_bias

  def head(x):
    rows = x.reshape(-1, x.shape[-1])
    logits = einsum('nd,vd->nv', rows, embedding, precision)
    return logits.reshape(*x.shape[:-1], -1)

  return head


# Heads by the value of `model.tie_embeddings`.
HEADS = {False: untied, True: tied}


def softcap(
  logits: Float[Array, '*rows vocab'], cap: float
) -> Float[Array, '*rows vocab']:
  """Returns `cap * tanh(logits / cap)`. Gemma 2, 2024.

  Args:
    logits: Logits.
    cap: Bound of their absolute values; 0 returns the logits unchanged.
  """
  return cap * jnp.tanh(logits / cap) if cap else logits
