"""SIGTERM and Ctrl-C as a flag: the loop decides where it is safe to stop."""

import contextlib
import os
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
  """The first signal sets `name`; the second leaves the process at once."""

  name: str | None = None

  def __bool__(self) -> bool:
    return self.name is not None

  def _handle(self, number, frame):
    del frame
    if self.name is not None:
      os._exit(128 + number)
    self.name = signal.Signals(number).name

  @contextlib.contextmanager
  def listening(self):
    """Handles signals inside the block; only the main thread of a process can.

    The handlers only set the flag: whatever they interrupt stays intact.
    """
    if threading.current_thread() is not threading.main_thread():
      yield self
      return
    previous = {
      number: signal.signal(number, self._handle) for number in _SIGNALS
    }
    try:
      yield self
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)
