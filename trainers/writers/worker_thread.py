"""Calls of code that may never answer."""

from collections.abc import Callable
from concurrent import futures
import queue
import threading
from typing import Any


class OwnThread:
  """Makes calls in a thread of their own, and waits for each: not for ever.

  A call that hangs holds up neither its caller, beyond the time that it is
  given, nor the end of the process. One call at a time: nothing queues up.

  Args:
    name: of the thread.
  """

  def __init__(self, name: str):
    self._name = name
    self._calls: queue.SimpleQueue = queue.SimpleQueue()
    self._thread: threading.Thread | None = None

  def __call__(self, call: Callable[[], Any], seconds: int) -> Any:
    """What `call` returns, or raises.

    Raises:
      TimeoutError: it has not answered. Nothing may be called after that.
    """
    if not self._thread:
      # Not of a pool: a pool's threads are waited for when the process ends.
      self._thread = threading.Thread(
        target=self._work, name=self._name, daemon=True
      )
      self._thread.start()
    future: futures.Future = futures.Future()
    self._calls.put((call, future))
    for _ in range(seconds):
      # By the second: a process that was stopped and continued, or slept, has
      # used up one of them, whatever the clock says.
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
      except BaseException as error:  # It is raised where it is waited for.
        future.set_exception(error)
