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
      with _leaving_at_second():
        yield self
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _leaving_at_second():
  """Ends the process at the second signal, also inside a long call of C.

  Handlers run between two instructions of Python: while XLA compiles, there
  are none.
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
