"""Batches that one thread makes ahead of the training loop, in order."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
from typing import TypeVar

T = TypeVar('T')


@contextlib.contextmanager
def prefetched(
  make: Callable[[int], T], start: int, depth: int = 2
) -> Iterator[Iterator[T]]:
  """Yields an iterator over make(start), make(start + 1), ...

  Items depend on their index only, so neither `depth` nor a resume changes
  them. The iterator raises an error of `make` at the item that failed.

  Args:
    make: Returns the item of an index.
    start: First index.
    depth: Number of items to make ahead.

  Yields:
    An endless iterator.
  """
  with futures.ThreadPoolExecutor(1, thread_name_prefix='prefetch') as pool:

    def items():
      queue = deque(pool.submit(make, start + i) for i in range(depth))
      index = start + depth
      while True:
        queue.append(pool.submit(make, index))
        index += 1
        yield queue.popleft().result()

    try:
      yield items()
    finally:
      pool.shutdown(wait=True, cancel_futures=True)
