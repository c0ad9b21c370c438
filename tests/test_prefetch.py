"""Batches ahead of time: the same ones, and no thread left behind."""

import threading
import time

import pytest

from trainers.runtime.prefetch import prefetched


def test_items_come_in_order_from_the_start():
  with prefetched(lambda i: i * i, start=3) as items:
    assert [next(items) for _ in range(5)] == [9, 16, 25, 36, 49]


def test_items_are_made_ahead_but_not_far():
  made = []

  def make(index):
    made.append(index)
    return index

  with prefetched(make, 0, depth=2) as items:
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
      time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2]  # The one in use, and two.


def test_an_error_is_raised_where_its_item_is_due():
  def make(index):
    if index == 2:
      raise ZeroDivisionError(f'item {index}')
    return index

  with prefetched(make, 0) as items:
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match='item 2'):
      next(items)


@pytest.mark.parametrize('taken', [0, 1, 4])
def test_leaving_early_ends_the_thread(taken):
  """Also by an error, which passes through."""
  before = set(threading.enumerate())
  with (
    pytest.raises(KeyError),
    prefetched(lambda i: time.sleep(0.002), 0) as items,
  ):
    for _ in range(taken):
      next(items)
    raise KeyError
  assert set(threading.enumerate()) <= before
