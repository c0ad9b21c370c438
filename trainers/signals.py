"""Signals that end a run: as a flag for the training loop, or an exception."""

from collections.abc import Collection, Iterator
import contextlib
import os
import signal
import threading
import time

_ALWAYS = (signal.SIGTERM, signal.SIGINT)
# A terminal that closes, and what batch systems send before they kill a job
# (`sbatch --signal=USR1@60`; submitit and LSF send SIGUSR2).
_UNLESS_IN_USE = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# A login shell passes on the SIGHUP that the kernel sends as well: one closed
# terminal is two signals, less than a millisecond apart.
SAME_HANGUP_SECONDS = 1.0


class Interrupt:
  """Flag that the first signal sets. The second signal ends the process.

  Attributes:
    name: Name of the first signal, or None.
    ends_process: Whether the second signal ends the process. If not, it raises
      KeyboardInterrupt, so that a notebook keeps its variables.
  """

  name: str | None = None
  ends_process: bool = True

  def __init__(self):
    self._seen = _Seen()

  def __bool__(self) -> bool:
    return self.name is not None

  def _handle(self, number, frame):
    del frame
    if self._seen.is_second(number):
      if not self.ends_process:
        raise KeyboardInterrupt(signal.Signals(number).name)
      os._exit(128 + number)
    if self.name is None:
      self.name = signal.Signals(number).name
      self._act()

  def _act(self) -> None:
    """Sets nothing but the flag: what the signal interrupts stays intact."""

  @contextlib.contextmanager
  def listening(self):
    """Handles signals inside the block, in the main thread of a process.

    SIGTERM and SIGINT are always handled. SIGHUP, SIGUSR1 and SIGUSR2 are left
    alone where they are ignored (`nohup`) or have a handler of another owner.
    In other threads it does nothing: Python allows no handlers there.

    Yields:
      This object.
    """
    if threading.current_thread() is not threading.main_thread():
      yield self
      return
    previous = {
      number: signal.signal(number, self._handle) for number in _handled()
    }
    try:
      with (
        _leaving_at_second(previous)
        if self.ends_process
        else contextlib.nullcontext()
      ):
        yield self
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)


class RaisingInterrupt(Interrupt):
  """Interrupt whose first signal raises KeyboardInterrupt, named after it."""

  def _act(self) -> None:
    raise KeyboardInterrupt(self.name)


class _Seen:
  """Count of the signals that a person or a batch system sent."""

  def __init__(self):
    self._count, self._hung_up = 0, -SAME_HANGUP_SECONDS

  def is_second(self, number: int) -> bool:
    """Counts a signal; whether another one came before it."""
    if number == signal.SIGHUP:
      before, self._hung_up = self._hung_up, time.monotonic()
      if self._count and self._hung_up - before < SAME_HANGUP_SECONDS:
        return False
    self._count += 1
    return self._count > 1


def _handled() -> Iterator[signal.Signals]:
  yield from _ALWAYS
  for number in _UNLESS_IN_USE:
    handler = signal.getsignal(number)
    is_ours = isinstance(getattr(handler, '__self__', None), Interrupt)
    if handler == signal.SIG_DFL or is_ours:
      yield number


@contextlib.contextmanager
def _leaving_at_second(numbers: Collection[int]):
  """Ends the process at the second signal, also inside a long call of C.

  Python runs handlers between two of its instructions, so that none runs while
  XLA compiles. A thread reads the numbers of signals from a pipe instead.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  seen = _Seen()

  def watch():
    while number := os.read(reader, 1):
      if number[0] in numbers and seen.is_second(number[0]):
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
