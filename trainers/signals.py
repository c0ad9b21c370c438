"""Flag for SIGTERM and Ctrl-C, which lets the loop stop at a safe point."""

import contextlib
import os
import signal
import threading

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
  """Flag that the first signal sets. The second signal ends the process.

  Attributes:
    name: Name of the first signal, or None.
  """

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
    """Handles signals inside the block, in the main thread of a process.

    In other threads it does nothing: Python allows no handlers there. The
    handlers only set the flag, so that the interrupted code completes.

    Yields:
      This object.
    """
    if threading.current_thread() is not threading.main_thread():
      yield self
      return
    previous = {
      number: signal.signal(number, self._handle) for number in _SIGNALS
    }
    try:
      with _leaving_at_second():
        yield self
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _leaving_at_second():
  """Ends the process at the second signal, also inside a long call of C.

  Python runs handlers between two of its instructions, so that none runs while
  XLA compiles. A thread reads the numbers of signals from a pipe instead.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def watch():
    num_seen = 0
    while number := os.read(reader, 1):
      num_seen += number[0] in _SIGNALS
      if num_seen == 2:
        os._exit(128 + number[0])

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(writer)
    thread.join()
    os.close(reader)
