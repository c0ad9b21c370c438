"""Metrics merge as sums do, whatever the order; and the small modules."""

import errno
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers import metrics
from trainers.files import to_json, write_atomically
from trainers.metrics import (
  Entropy,
  Last,
  MaxOverMean,
  Mean,
  MutualInformation,
  ShareOfZeros,
)
from trainers.runtime.clock import Clock


def of(total, count, last):
  return {
    'mean': Mean(jnp.asarray(total), jnp.asarray(count)),
    'last': Last(jnp.asarray(last)),
  }


def test_a_mean_of_parts_is_the_mean_of_the_whole():
  values, weights = [4.0, 1.0, 7.0], [1.0, 5.0, 2.0]
  merged = metrics.zeros_like(of(0.0, 0.0, 0.0))
  for value, weight in zip(values, weights, strict=True):
    merged = metrics.merge(merged, of(value * weight, weight, value))
  computed = metrics.compute(merged)
  # (4 + 5 + 14) / 8, not (4 + 1 + 7) / 3.
  assert computed == {'mean': 2.875, 'last': 7.0}


def test_the_largest_over_the_mean_is_of_the_sums():
  """The first row: twice the mean in each part, and even in their sum."""
  parts = [[[4.0, 0.0], [3.0, 1.0]], [[0.0, 4.0], [3.0, 1.0]]]
  first, second = ({'load': MaxOverMean(jnp.asarray(p))} for p in parts)
  none = metrics.zeros_like(first)
  merged = metrics.merge(metrics.merge(none, first), second)
  assert metrics.compute(merged) == {'load': [1.0, 1.5]}
  assert np.isnan(metrics.compute(none)['load']).all()


def test_the_entropy_is_of_the_sums():
  """Each part on one of two: certain; their sum even. And 3 to 1, twice."""
  parts = [[[4.0, 0.0], [3.0, 1.0]], [[0.0, 4.0], [3.0, 1.0]]]
  first, second = (Entropy(jnp.asarray(p)) for p in parts)
  three = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
  np.testing.assert_allclose(first.compute(), [0, three])
  np.testing.assert_allclose(first.merge(second).compute(), [np.log(2), three])
  assert np.isnan(Entropy(jnp.zeros(3)).compute())


def test_the_share_of_zeros_is_of_the_sums():
  first = ShareOfZeros(jnp.array([[0.0, 0.0, 2.0], [1.0, 1.0, 1.0]]))
  second = ShareOfZeros(jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
  np.testing.assert_allclose(first.compute(), [2 / 3, 0])
  np.testing.assert_allclose(first.merge(second).compute(), [1 / 3, 0])
  assert np.isnan(ShareOfZeros(jnp.zeros(3)).compute())


def test_mutual_information_of_known_pairs(rng):
  """Independent, determined either way, and always the same."""
  of_x, of_y = rng.integers(1, 9, (2, 4)).astype(float)
  halves = np.array([[2.0, 2, 0, 0], [0, 0, 2, 2]])
  # x is a half of y: it tells ln 2 of ln 4. y tells all of x.
  for pairs, told in [
    (np.outer(of_x, of_y), 0),
    (np.eye(5)[rng.permutation(5)] * 3, 1),
    (halves, 0.5),
    (halves.T, 1),
    (np.array([[3.0, 0], [5, 0]]), np.nan),  # y is always the same.
    (np.array([[3.0, 5], [0, 0]]), 0),  # x is.
    (np.zeros((2, 2)), np.nan),
  ]:
    found = MutualInformation(jnp.asarray(pairs)).compute()
    np.testing.assert_allclose(found, told, atol=1e-6)
  merged = MutualInformation(jnp.asarray(halves)).merge(
    MutualInformation(jnp.asarray(halves[::-1]))
  )
  np.testing.assert_allclose(merged.compute(), 0, atol=1e-6)


def test_arrays_are_means_by_element():
  total, count = np.array([2.0, 9.0, 0.0]), np.array([1.0, 3.0, 0.0])
  computed = metrics.compute(
    {'load': Mean(jnp.asarray(total), jnp.asarray(count))}
  )
  assert computed['load'][:2] == [2.0, 3.0]
  assert np.isnan(computed['load'][2])  # Nothing was counted.


def test_zeros_need_only_shapes():
  shapes = jax.eval_shape(lambda: of(np.ones(3, np.float32), 2, 1.0))
  zeros = metrics.zeros_like(shapes)
  assert zeros['mean'].total.shape == (3,)
  assert not np.any(zeros['mean'].total)
  assert zeros['mean'].count.dtype == np.int32


def test_prefixed():
  assert metrics.prefixed('val', {'x': 1}) == {'val/x': 1}


# Clock.


def test_an_inner_phase_pauses_the_outer_one():
  before = time.perf_counter()
  clock = Clock()
  start = time.perf_counter()
  with clock.phase('outer'):
    time.sleep(0.01)
    with pytest.raises(KeyError), clock.phase('inner'):
      time.sleep(0.05)
      raise KeyError
    time.sleep(0.01)
  elapsed = time.perf_counter() - start
  assert clock.read('inner') >= 0.05
  assert clock.read('outer') >= 0.02
  # No second is counted twice, and none is lost.
  assert clock.read('inner') + clock.read('outer') <= elapsed
  total = sum(clock.seconds.values())
  assert elapsed <= total <= time.perf_counter() - before


# Files.


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'result.json'
  write_atomically(path, 'old\n')
  write_atomically(path, 'new ★\n')
  assert path.read_bytes() == 'new ★\n'.encode()

  def full(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch, pytest.raises(OSError, match='space'):
    patch.setattr(os, 'fsync', full)
    write_atomically(path, 'half' * 10_000)
  assert path.read_text(encoding='utf-8') == 'new ★\n'
  assert [p.name for p in tmp_path.iterdir()] == ['result.json']


def test_json_has_null_for_what_is_no_number():
  value = {'a': [1.5, float('nan')], 'b': (float('-inf'), True), 'c': 'é'}
  assert to_json(value) == '{"a": [1.5, null], "b": [null, true], "c": "é"}'
