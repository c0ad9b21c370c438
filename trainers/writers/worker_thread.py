"""Calls with a time limit, for code that may hang."""

from collections.abc import Callable
from concurrent import futures
import queue
import threading
from typing import Any


class OwnThread:
  """Worker thread that makes one call at a time, each with a time limit.

  A call that hangs delays its caller by the time limit. It does not delay the
  end of the process.

  Args:
    name: Name of the thread.
  """

  def __init__(self, name: str):
    self._name = name
    self._calls: queue.SimpleQueue = queue.SimpleQueue()
    self._thread: threading.Thread | None = None

  def __call__(self, call: Callable[[], Any], seconds: int) -> Any:
    """Makes a call in the thread and waits for it.

    Args:
      call: Function without arguments. Its exceptions are raised here.
      seconds: Time limit.

    Returns:
      The result of `call`.

    Raises:
      TimeoutError: The time limit passed. No further call may be made.
    """
    if not self._thread:
      # A pool would not do: a process waits for the threads of its pools.
      self._thread = threading.Thread(
        target=self._work, name=self._name, daemon=True
      )
      self._thread.start()
    future: futures.Future = futures.Future()
    self._calls.put((call, future))
    for _ in range(seconds):
      # Waits of one second: a process that was stopped and continued, or slept,
      # loses one of them at most, however far the clock advanced.
      if futures.wait([future], 1).done:
        return future.result()
    raise TimeoutError(f'no answer for {seconds} s')

  def end(self) -> None:
    """Ends the thread, unless it hangs."""
    self._calls.put(None)

  def _work(self) -> None:
    while task := self._calls.get():
      call, future = task
      try:
        future.set_result(call())
      except BaseException as error:  # Raised again in __call__.
        future.set_exception(error)
