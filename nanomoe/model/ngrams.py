"""Embeddings of n-grams: the last few tokens together."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

# Multiplier of Knuth's multiplicative hash: 2^32 over the golden ratio.
MULTIPLIER = 2_654_435_761


class Ngrams(nn.Module):
  """Sum of the embeddings of the last n tokens, for n = 2 .. max_ngram.

  Pagnoni et al. 2024 (BLT), sec. 3.2.1, with tokens in place of bytes and with
  n from 2 on. A table has one row for each n-gram if `num_rows` suffices;
  otherwise n-grams share rows by a hash. Positions before a window count as one
  more token of the vocabulary. A token reads one row of each table, so the
  number of rows costs memory and no time. The module is causal.

  Attributes:
    vocab_size: Number of tokens in the vocabulary.
    d_model: Width of an embedding.
    max_ngram: Longest n-gram with an embedding; 1 disables n-grams.
    num_rows: Largest number of rows of a table.
  """

  vocab_size: int
  d_model: int
  max_ngram: int
  num_rows: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    tokens: Int[Array, 'batch positions'],
    start: Int[Array, ' batch'],
  ) -> Float[Array, 'batch time d_model']:
    """Returns x plus the embeddings.

    Args:
      x: Activations of the tokens at the positions from `start` on.
      tokens: Token ids of the window by position, at least up to those of x.
      start: Position of the first token of x in each sequence.
    """
    position = start[:, None] + jnp.arange(x.shape[1])  # [batch, time]
    code = jnp.zeros(position.shape, jnp.uint32)
    init = nn.initializers.normal(0.02)
    for n in range(1, self.max_ngram + 1):
      nth_last = jnp.take_along_axis(
        tokens, jnp.maximum(position - n + 1, 0), axis=1
      )
      token = jnp.where(position < n - 1, self.vocab_size, nth_last)
      code = code * jnp.uint32(self.vocab_size + 1) + token.astype(jnp.uint32)
      if n > 1:
        num_ngrams = (self.vocab_size + 1) ** n
        shape = min(num_ngrams, self.num_rows), self.d_model
        table = self.param(f'ngram_{n}_embedding', init, shape)
        x = x + table[row(code, num_ngrams, len(table))]
    return x


def row(
  code: UInt[Array, '*shape'], num_codes: int, num_rows: int
) -> Int[Array, '*shape']:
  """Returns the table row of each n-gram.

  Args:
    code: Number of the n-gram, modulo 2^32.
    num_codes: Number of n-grams.
    num_rows: Number of rows of the table.

  Returns:
    The code itself if each n-gram has a row, else a hash of the code.
  """
  if num_codes > num_rows:
    # Upper bits of the product: its lower bits ignore the code's upper bits.
    code = (code * jnp.uint32(MULTIPLIER) >> 8) % jnp.uint32(num_rows)
  return jax.lax.convert_element_type(code, jnp.int32)
