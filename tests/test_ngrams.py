"""Embeddings of n-grams, against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.ngrams import Ngrams, row

VOCAB, WIDTH = 5, 3


@pytest.mark.parametrize('max_ngram', [1, 2, 3])
@pytest.mark.parametrize('start', [0, 4])
def test_a_loop_over_tokens(rng, max_ngram, start):
  tokens = rng.integers(0, VOCAB, (2, 9))
  x = rng.normal(size=(2, 5, WIDTH)).astype(np.float32)
  module = Ngrams(VOCAB, WIDTH, max_ngram, num_rows=1000)
  starts = jnp.full(2, start)
  y, variables = module.init_with_output(
    jax.random.key(0), jnp.asarray(x), jnp.asarray(tokens), starts
  )
  tables = variables.get('params', {})
  # A row for each n-gram; positions before a window are one more token.
  assert {k: v.shape for k, v in tables.items()} == {
    f'ngram_{n}_embedding': (6**n, WIDTH) for n in range(2, max_ngram + 1)
  }
  for b in range(2):
    for t in range(5):
      expected, p = x[b, t].copy(), start + t
      for n in range(2, max_ngram + 1):
        gram = [tokens[b, p - j] if p >= j else VOCAB for j in range(n)]
        index = sum(g * 6 ** (n - 1 - j) for j, g in enumerate(gram))
        expected += tables[f'ngram_{n}_embedding'][index]
      np.testing.assert_allclose(y[b, t], expected, rtol=1e-6)


@pytest.mark.parametrize('num_codes', [67**3, 30_000**2, 2**32])
def test_hashed_ngrams_share_all_rows_evenly(num_codes):
  """The largest load of a row is like that of independent draws."""
  num_rows, per_row = 1000, 50
  code = np.linspace(0, num_codes - 1, num_rows * per_row).astype(np.uint32)
  load = np.bincount(row(jnp.asarray(code), num_codes, num_rows))
  assert len(load) == num_rows
  # Six standard deviations.
  assert load.max() < per_row + 6 * per_row**0.5
  assert load.min() > per_row - 6 * per_row**0.5


def test_ngrams_that_differ_in_the_oldest_token_have_different_rows():
  code = jnp.arange(67, dtype=jnp.uint32) * 67**2
  assert len(np.unique(row(code, 67**3, 8192))) > 60
