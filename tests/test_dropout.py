"""Dropout: its rate, its expectation, independent masks, and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.ops.dropout import Dropout, keep_mask, key_of_rows
from tests.shrunk import mostly_slow
from trainers.errors import UserError


@pytest.mark.parametrize('rate', mostly_slow([0.1, 0.5], 0.1))
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


SHAPE = 32, 4, 64, 64


def _halves(key):
  """Returns a mask of rate 0.5, `int[SHAPE]`."""
  return np.asarray(keep_mask(key, 0.5, SHAPE)[0]).astype(int)


def _assert_fair(patterns, num_patterns):
  """Asserts by a chi-squared test that patterns are equally frequent."""
  counts = np.bincount(patterns.ravel(), minlength=num_patterns)
  expected = patterns.size / num_patterns
  degrees = num_patterns - 1
  chi_squared = np.sum((counts - expected) ** 2) / expected
  assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize('seed', [0, 1, 2**31])
def test_neighboring_elements_are_independent(seed):
  bits = _halves(jax.random.key(seed))
  for axis in range(bits.ndim):
    for distance in (1, 2):
      # [pairs of blocks, two blocks, distance, the rest]: disjoint pairs.
      blocks = np.moveaxis(bits, axis, 0).reshape(-1, 2, distance, bits[0].size)
      _assert_fair(blocks[:, 0] + 2 * blocks[:, 1], 4)
  _assert_fair(bits.reshape(-1, 8) @ (1 << np.arange(8)), 2**8)


def test_masks_of_several_steps_are_independent():
  key = jax.random.key(0)
  masks = [_halves(jax.random.fold_in(key, s)) for s in range(6)]
  _assert_fair(sum(mask << i for i, mask in enumerate(masks)), 2**6)


def test_masks_of_like_keys_are_no_permutations_of_one_another():
  one, other = (
    _halves(jax.random.wrap_key_data(jnp.full(2, word, jnp.uint32))).ravel()
    for word in (0, 1)
  )
  for moved in range(64):
    again = other[np.arange(one.size) ^ moved]
    _assert_fair(one + 2 * again, 4)


def test_no_dropout_in_evaluation_or_at_rate_0():
  x = jnp.arange(8.0)
  assert (Dropout(0.5).apply({}, x, train=False) == x).all()
  assert (Dropout(0.0).apply({}, x, train=True) == x).all()


@pytest.mark.parametrize('derive', ['key', 'folded', 'split'])
def test_rows_of_a_key_are_those_of_the_large_mask(derive):
  """Every fourth row, and a row number of a compiled loop."""

  def derived(key):
    folded = jax.random.fold_in(key, 7)
    return {
      'key': key,
      'folded': jax.random.fold_in(folded, 2**31),
      'split': jax.random.split(folded, 3)[1],
    }[derive]

  @jax.jit
  def rows(key, first):
    key = key_of_rows(key, first, 4)
    return keep_mask(derived(key), 0.3, (2, 5, 3))

  key = jax.random.key(5)
  mask, keep = keep_mask(derived(key), 0.3, (8, 5, 3))
  for first in range(4):
    found, found_keep = rows(key, first)
    np.testing.assert_array_equal(found, mask[first::4])
    assert found_keep == pytest.approx(keep)


def test_a_key_of_rows_draws_no_other_random_numbers():
  """They would be those of the first rows, in every micro-batch."""
  key = key_of_rows(jax.random.key(0), 0, 2)
  draw = jax.jit(lambda key: jax.random.normal(jax.random.fold_in(key, 1), 3))
  with pytest.raises(UserError, match='accumulate_steps'):
    draw(key)
  with pytest.raises(ValueError, match='rbg'):
    key_of_rows(jax.random.key(0, impl='rbg'), 0, 2)
