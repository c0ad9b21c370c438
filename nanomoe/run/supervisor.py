"""Child processes that start together, share a terminal, and end together."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import IO, Any, NamedTuple

from nanomoe.run import cli
from trainers.signals import SAME_HANGUP_SECONDS

GRACE_SECONDS = 15.0  # Between SIGTERM and SIGKILL.
_SECOND_SIGNAL_SECONDS = 2.0
_PASSED_ON = (
  *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP),
  *(signal.SIGUSR1, signal.SIGUSR2),
)
_COLOURS = (36, 33, 32, 35, 34, 31)
_MAX_LINE = 1 << 20

# A child takes its cores, asks Linux for a signal once its parent has died
# (PR_SET_PDEATHSIG is 1), and becomes the command.
_SHIM = """
import ctypes, os, sys
parent, number, cores, *command = sys.argv[1:]
if cores:
  os.sched_setaffinity(0, set(map(int, cores.split(','))))
ctypes.CDLL(None).prctl(1, int(number))
if os.getppid() != int(parent):
  sys.exit(128 + int(number))
os.execv(command[0], command)
"""


class Command(NamedTuple):
  """A child process to start.

  Attributes:
    words: Command line; the first word is the path of a program.
    environ: Environment variables beside those of this process.
    cores: CPU cores that the child may use; none stands for all.
  """

  words: Sequence[str]
  environ: Mapping[str, str] = {}
  cores: Sequence[int] = ()


def run_all(commands: Sequence[Command]) -> int:
  """Runs commands until all have ended; returns their common exit code.

  The output of a child appears line by line, behind its number. Each signal is
  passed on to all children. A second signal kills those that do not end. The
  first failure ends all others. On Linux no child survives this process.

  Args:
    commands: A command for each child.

  Returns:
    The exit code of the first child that failed, 128 plus the signal if a
    signal killed it, or that of an interrupted run; 0 if none failed.
  """
  return _Supervisor().run(commands)


class _Pipe:
  """Pipe of a child, whose lines are copied to a stream of this process."""

  def __init__(self, index: int, source: IO[bytes], target: Any):
    self.source = source
    self._target = target
    self._rest = b''
    self._prefix = f'[{index}] '
    if target.isatty() and not os.environ.get('NO_COLOR'):
      colour = _COLOURS[index % len(_COLOURS)]
      self._prefix = f'\033[{colour}m[{index}]\033[0m '
    os.set_blocking(source.fileno(), False)

  def copy(self) -> bool:
    """Copies whole lines; returns whether more can follow."""
    try:
      data = os.read(self.source.fileno(), 1 << 16)
    except BlockingIOError:
      return True
    *lines, self._rest = (self._rest + data).split(b'\n')
    if self._rest and (not data or len(self._rest) > _MAX_LINE):
      lines, self._rest = [*lines, self._rest], b''
    for line in lines:
      text = line.decode('utf-8', 'backslashreplace')
      self._target.write(f'{self._prefix}{text}\n')
    self._target.flush()
    return bool(data)


class _Supervisor:
  """Children, and what has happened to them."""

  def __init__(self):
    self._children: list[subprocess.Popen] = []
    self._running: set[int] = set()
    self._signals: list[int] = []
    self._hung_up = -SAME_HANGUP_SECONDS
    self._code = 0
    self._kill_at: float | None = None

  def run(self, commands: Sequence[Command]) -> int:
    with selectors.DefaultSelector() as selector, _signal_pipe() as reader:
      selector.register(reader, selectors.EVENT_READ)
      try:
        for index, command in enumerate(commands):
          self._children.append(_start(command))
          self._running.add(index)
          for pipe in _pipes(index, self._children[-1]):
            selector.register(pipe.source, selectors.EVENT_READ, pipe)
        while self._running:
          self._wait(selector, reader, self._seconds_left())
          self._look()
        # A grandchild may keep a pipe open: what comes within a second.
        end = time.monotonic() + 1.0
        while len(selector.get_map()) > 1 and time.monotonic() < end:
          self._wait(selector, reader, 0.1)
      finally:
        self._kill()
    return self._code

  def _seconds_left(self) -> float | None:
    if self._kill_at is None:
      return None
    return max(self._kill_at - time.monotonic(), 0.0)

  def _wait(
    self,
    selector: selectors.BaseSelector,
    reader: int,
    seconds: float | None,
  ) -> None:
    """Handles the lines and signals that come within some seconds."""
    for key, _ in selector.select(seconds):
      if key.data is None:
        for number in os.read(reader, 4096):
          self._pass_on(number)
      elif not key.data.copy():
        selector.unregister(key.fileobj)
        key.data.source.close()

  def _pass_on(self, number: int) -> None:
    """Sends a signal of this process to all children."""
    if number not in _PASSED_ON:  # SIGCHLD wakes the loop.
      return
    if number == signal.SIGHUP:
      before, self._hung_up = self._hung_up, time.monotonic()
      if self._hung_up - before < SAME_HANGUP_SECONDS:
        return
    self._signals.append(number)
    self._send(number)
    if len(self._signals) == 2:
      self._kill_at = time.monotonic() + _SECOND_SIGNAL_SECONDS

  def _send(self, number: int) -> None:
    for index in self._running:
      self._children[index].send_signal(number)

  def _look(self) -> None:
    """Notices children that have ended, and ends the others after a failure."""
    for index in sorted(self._running):
      code = self._children[index].poll()
      if code is None:
        continue
      self._running.discard(index)
      if code and not self._code:
        self._fail(index, code)
    if self._kill_at is not None and time.monotonic() >= self._kill_at:
      self._kill()

  def _fail(self, index: int, code: int) -> None:
    """Handles the first failure."""
    # A signal may come before a child has its handler.
    is_interrupted = [-code] == self._signals
    self._code = code if code > 0 else 128 - code
    if is_interrupted:
      self._code = cli.INTERRUPTED
    if self._kill_at is None:
      self._kill_at = time.monotonic() + GRACE_SECONDS
    # Interrupted children stop after the same step, each by itself; another
    # signal would be their second.
    if self._signals or self._code == cli.INTERRUPTED:
      return
    how = f'exit code {code}' if code > 0 else signal.Signals(-code).name
    rest = '; the others are ended' if self._running else ''
    print(f'process {index} ended by {how}{rest}', file=sys.stderr, flush=True)
    self._send(signal.SIGTERM)

  def _kill(self) -> None:
    """Kills children that run, and the processes that they started."""
    for index in self._running:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._children[index].pid, signal.SIGKILL)


def bound_words(command: Command, number: signal.Signals) -> list[str]:
  """Returns the words that start a child on its cores, bound to this process.

  Args:
    command: Command of the child.
    number: Signal that the child gets once this process has died, on Linux.
  """
  words = list(command.words)
  if sys.platform != 'linux':
    return words
  cores = ','.join(map(str, command.cores))
  shim = [sys.executable, '-I', '-S', '-c', _SHIM]
  return [*shim, str(os.getpid()), str(int(number)), cores, *words]


def _start(command: Command) -> subprocess.Popen:
  return subprocess.Popen(
    bound_words(command, signal.SIGKILL),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, **command.environ},
    # Ctrl-C of a terminal reaches this process alone, which passes it on.
    start_new_session=True,
  )


def _pipes(index: int, child: subprocess.Popen) -> Iterator[_Pipe]:
  for source, target in (
    (child.stdout, sys.stdout),
    (child.stderr, sys.stderr),
  ):
    assert source
    yield _Pipe(index, source, target)


@contextlib.contextmanager
def _signal_pipe() -> Iterator[int]:
  """Yields a descriptor from which the numbers of signals are read."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  handlers = {
    number: signal.signal(number, lambda *_: None)
    for number in (*_PASSED_ON, signal.SIGCHLD)
    if signal.getsignal(number) != signal.SIG_IGN  # As nohup ignores SIGHUP.
  }
  try:
    yield reader
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(before)
    os.close(writer)
    os.close(reader)
