"""Heads: functions from the last activations to logits."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanomoe.model.interfaces import Head
from nanomoe.ops.matmul import einsum


class Output(nn.Module):
  """Parameters of an output layer.

  Attributes:
    features: Number of tokens in the vocabulary.
    use_bias: Whether the layer has a bias.
  """

  features: int
  use_bias: bool

  @nn.compact
  def __call__(self, d_model: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns the kernel, `[d_model, vocab]`, and the bias, `[vocab]`."""
    init, zeros = nn.initializers.normal(0.02), nn.initializers.zeros_init()
    kernel = self.param('kernel', init, (d_model, self.features))
    if not self.use_bias:
      return kernel, None
    return kernel, self.param('bias', zeros, (self.features,))


def untied(
  embedding: Float[Array, 'vocab d_model'], *, use_bias: bool, precision: str
) -> Head:
  """Returns the product with a matrix of its own, plus a bias.

  Args:
    embedding: Token embeddings, of which only the shape is used.
    use_bias: Whether the layer has a bias.
    precision: Precision of the matrix product.
  """
  vocab_size, d_model = embedding.shape
  kernel, bias = Output(vocab_size, use_bias, name='head')(d_model)

  def head(x):
    rows = x.reshape(-1, d_model)
    logits = einsum('nd,df->nf', rows, kernel, precision, bias)
    return logits.reshape(*x.shape[:-1], vocab_size)

  return head


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
