"""Dropout: its rate, its expectation, and that evaluation has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.dropout import Dropout, keep_mask


@pytest.mark.parametrize('rate', [0.1, 0.5])
@pytest.mark.parametrize('shape', [(1001,), (7, 11, 13), (256, 256)])
def test_rate_and_expectation(rate, shape):
  x = jnp.ones(shape)
  y = Dropout(rate).apply(
    {}, x, train=True, rngs={'dropout': jax.random.key(1)}
  )
  dropped = np.mean(y == 0)
  deviation = np.sqrt(rate * (1 - rate) / x.size)
  assert abs(dropped - rate) < 4 * deviation
  assert abs(y.mean() - 1) < 4 * deviation / (1 - rate)
  np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-4)


def test_neighbours_share_a_word_but_no_bit():
  mask, _ = keep_mask(jax.random.key(0), 0.5, (1 << 16,))
  pairs = np.asarray(mask).reshape(-1, 2)
  together = np.mean(pairs[:, 0] == pairs[:, 1])
  assert abs(together - 0.5) < 4 * 0.5 / np.sqrt(len(pairs))


def test_none_in_evaluation_and_at_rate_0():
  x = jnp.arange(8.0)
  assert (Dropout(0.5).apply({}, x, train=False) == x).all()
  assert (Dropout(0.0).apply({}, x, train=True) == x).all()
