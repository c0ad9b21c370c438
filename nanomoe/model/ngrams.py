"""Embeddings of the last few tokens together."""

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

# Knuth's multiplier: 2^32 over the golden ratio.
MULTIPLIER = 2_654_435_761


class Ngrams(nn.Module):
  """The sum, over n = 2 .. max_ngram, of an embedding of the last n tokens.

  Pagnoni et al. 2024 (BLT), sec. 3.2.1, of tokens for bytes, n from 2 on. A
  table has a row for each n-gram if there are as many rows, else n-grams share
  rows by a hash. What comes before a window is one more token. Causal: a
  token's rows depend on it and on those before. A token reads a row of each
  table, however many there are: parameters that cost memory alone.

  Attributes:
    vocab_size: V.
    d_model: width of a row.
    max_ngram: the largest n; 1: there are none.
    num_rows: of a table, at most.
  """

  vocab_size: int
  d_model: int
  max_ngram: int
  num_rows: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    seen: Int[Array, 'batch positions'],
    start: Int[Array, ' batch'],
  ) -> Float[Array, 'batch time d_model']:
    """x and the embeddings.

    Args:
      x: of the tokens at positions start, start + 1, ...
      seen: all tokens of the window, up to these at least.
      start: the first one's position.
    """
    position = start[:, None] + jnp.arange(x.shape[1])
    code = jnp.zeros(position.shape, jnp.uint32)
    init = nn.initializers.normal(0.02)
    for n in range(1, self.max_ngram + 1):
      before = jnp.take_along_axis(
        seen, jnp.maximum(position - n + 1, 0), axis=1
      )
      token = jnp.where(position < n - 1, self.vocab_size, before)
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
  """Of a table: the code itself if it has a row, else a hash of it."""
  if num_codes > num_rows:
    # The upper bits: lower ones do not depend on the code's upper ones.
    code = (code * jnp.uint32(MULTIPLIER) >> 8) % jnp.uint32(num_rows)
  return jax.lax.convert_element_type(code, jnp.int32)
