"""Batches that are cut from a text."""

import numpy as np
import pytest

from nanomoe.data import pipeline as text_lib
from nanomoe.data.windows import Windows
from trainers.errors import UserError


def windows(train, val=None, **changes):
  """Small windows; a split is tokens, or how many of them: 0, 1, 2, ..."""
  splits = {
    name: np.arange(t, dtype=np.int32) if isinstance(t, int) else t
    for name, t in [('train', train), ('val', train if val is None else val)]
  }
  settings = dict(seed=0, batch_size=4, block_size=8, eval_iters=3)
  return Windows(splits, **{**settings, **changes})


def every(batch_size=4):
  return slice(0, batch_size)


def equal(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_seed_and_index():
  one, other = windows(500), windows(500)
  first = [one.train_batch(i, every()) for i in range(6)]
  for i in (5, 0, 3, 3):  # In any order, and again.
    assert equal(other.train_batch(i, every()), first[i])
  for i in range(6):
    for j in range(i):
      assert not equal(first[i], first[j])
  reseeded = windows(500, seed=1)
  assert not any(
    equal(reseeded.train_batch(i, every()), first[j])
    for i in range(6)
    for j in range(6)
  )


def test_the_largest_seed_and_a_far_index():
  batch = windows(500, seed=2**32 - 1).train_batch(10**9, every())
  assert batch['inputs'].shape == (4, 8)


def test_targets_are_inputs_one_further_on():
  batch = windows(500).train_batch(3, every())
  assert batch['inputs'].shape == batch['targets'].shape == (4, 8)
  assert batch['inputs'].dtype == batch['targets'].dtype == np.int32
  # Token i is i: consecutive tokens differ by one.
  np.testing.assert_array_equal(np.diff(batch['inputs'], axis=1), 1)
  np.testing.assert_array_equal(batch['targets'], batch['inputs'] + 1)
  assert batch['weights'].dtype == np.float32
  np.testing.assert_array_equal(batch['weights'], np.ones((4, 8)))


def test_all_windows_are_equally_likely_the_first_and_the_last_included():
  data = windows(20, batch_size=64, block_size=4)
  starts = np.concatenate(
    [data.train_batch(i, every(64))['inputs'][:, 0] for i in range(100)]
  )
  counts = np.bincount(starts, minlength=16)
  assert len(counts) == 16  # Starts 0 .. 15: 15 + 4 inputs + 1 target = 20.
  expected = 6400 / 16
  chi_square = np.sum((counts - expected) ** 2 / expected)
  # 15 degrees of freedom: mean 15, and above 45 once in 10,000 seeds.
  assert chi_square < 45


def test_rows_of_a_batch_make_the_whole():
  for eval_iters in (0, 2):
    data = windows(75, eval_iters=eval_iters)

    def batches(rows, data=data):
      return [data.train_batch(7, rows), *data.eval_batches('val', rows)]

    parts = [batches(slice(i, j)) for i, j in [(0, 1), (1, 3), (3, 4)]]
    for whole, *pieces in zip(batches(every()), *parts, strict=True):
      joined = {k: np.concatenate([p[k] for p in pieces]) for k in whole}
      assert equal(joined, whole)


@pytest.mark.parametrize('num_tokens', [9, 10, 32, 33, 34, 63, 64, 65, 66, 97])
def test_the_exact_pass_has_every_target_once(num_tokens):
  """Batches of 4 * 8 = 32 targets; n tokens have n - 1 targets."""
  batches = list(windows(num_tokens, eval_iters=0).eval_batches('val', every()))
  assert len(batches) == -(-(num_tokens - 1) // 32)
  counted = np.concatenate([b['weights'].ravel() for b in batches])
  targets = np.concatenate([b['targets'].ravel() for b in batches])
  inputs = np.concatenate([b['inputs'].ravel() for b in batches])
  assert counted.sum() == num_tokens - 1
  assert set(counted) <= {0.0, 1.0}
  kept = counted > 0
  np.testing.assert_array_equal(targets[kept], np.arange(1, num_tokens))
  np.testing.assert_array_equal(inputs[kept], targets[kept] - 1)
  # One program for all of them.
  assert {b['inputs'].shape for b in batches} == {(4, 8)}
  assert {b['weights'].dtype for b in batches} == {np.dtype(np.float32)}
  assert {b['targets'].dtype for b in batches} == {np.dtype(np.int32)}


def test_a_window_of_the_exact_pass_is_consecutive():
  for batch in windows(97, eval_iters=0).eval_batches('val', every()):
    np.testing.assert_array_equal(np.diff(batch['inputs'], axis=1), 1)


def test_an_evaluation_is_the_same_every_time_and_finite():
  data = windows(500, eval_iters=3)
  first = list(data.eval_batches('val', every()))
  assert len(first) == 3
  for again in (data, windows(500, eval_iters=3)):
    batches = again.eval_batches('val', every())
    assert all(equal(a, b) for a, b in zip(batches, first, strict=True))


def test_evaluation_on_the_training_text_has_windows_of_its_own():
  """The same tokens in both splits: only the draws can differ."""
  data = windows(5000, eval_iters=3)
  draws = [
    [data.train_batch(i, every()) for i in range(3)],
    list(data.eval_batches('train', every())),
    list(data.eval_batches('val', every())),
  ]
  starts = [np.concatenate([b['inputs'][:, 0] for b in d]) for d in draws]
  for i in range(3):
    for j in range(i):
      assert not np.array_equal(starts[i], starts[j])


def test_splits_never_mix(tiny):
  """The composition root's split: the last tenth is never trained on."""
  config = tiny({'eval_iters': 0, 'batch_size': 16})
  data = text_lib.build_dataset(
    config, text_lib.split(np.arange(1005, dtype=np.int32))
  )
  seen = np.concatenate(
    [
      b[k].ravel()
      for b in (data.train_batch(i, every(16)) for i in range(100))
      for k in ('inputs', 'targets')
    ]
  )
  assert seen.min() == 0
  assert seen.max() == 903  # int(0.9 * 1005) = 904 tokens.
  seen = np.concatenate(
    [
      b[k][b['weights'] > 0]
      for b in data.eval_batches('val', every(16))
      for k in ('inputs', 'targets')
    ]
  )
  assert (seen.min(), seen.max()) == (904, 1004)


@pytest.mark.parametrize('eval_iters', [0, 2])
def test_one_window_is_enough(eval_iters):
  data = windows(9, eval_iters=eval_iters)  # 8 inputs and the last target.
  batch = data.train_batch(0, every())
  np.testing.assert_array_equal(batch['inputs'], np.tile(np.arange(8), (4, 1)))
  assert list(data.eval_batches('val', every()))


def test_a_text_that_is_too_short_is_told_for_every_split():
  with pytest.raises(UserError) as error:
    windows(8, 5)
  train, val = error.value.problems
  for line, name, num in [(train, 'train', '8'), (val, 'val', '5')]:
    assert 'block_size=8' in line
    assert name in line
    assert f' {num} ' in line.replace('block_size=8', '')
  with pytest.raises(UserError, match='val'):
    windows(9, 8)


def test_the_fingerprint_is_of_the_tokens_and_the_splits():
  def fingerprint(*splits):
    return windows(*splits).fingerprint

  tokens = np.arange(100, dtype=np.int32)
  other = tokens.copy()
  other[50] = 7
  assert fingerprint(100, 50) == fingerprint(tokens, tokens[:50])
  assert fingerprint(100, 50) == fingerprint(tokens.astype(np.int64), 50)
  different = {
    fingerprint(tokens, 50),
    fingerprint(other, 50),
    fingerprint(50, tokens),
    fingerprint(tokens[:60], tokens[60:]),
    fingerprint(tokens[:61], tokens[61:]),
  }
  assert len(different) == 5
