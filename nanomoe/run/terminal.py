"""Log lines as people see them: plain where piped, coloured on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
  from rich.console import Console

log = logging.getLogger(__name__)

LOGGERS = ('nanomoe', 'trainers')

# log.info(..., extra=RESULT): said to who asked for quiet too.
RESULT = {'is_result': True}


class Output:
  """A text stream that may go away: a failed write is kept and not raised.

  A pipe whose reader has left, a full disk or a closed terminal must not end a
  run. Each write is tried, so lines appear again once there is room.

  Args:
    stream: Stream that is written to.

  Attributes:
    error: Newest error of `stream`, or None.
    is_log: Whether log lines alone are written to it: log.txt has them too, so
      an error does not change the exit code.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream
    self.error: OSError | None = None
    self.is_log = False

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
    except OSError as error:
      self.error = error
    return len(text)

  def writelines(self, lines: Iterable[str]) -> None:
    self.write(''.join(lines))

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError as error:
      self.error = error

  def leave_to_python(self) -> None:
    """Gives the descriptor of a library's lines, those of C++, to /dev/null.

    Gloo prints a line on standard output for each group of processes.
    """
    self.flush()
    old = self._stream
    kept = os.dup(old.fileno())
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, old.fileno())
    os.close(null)
    self._stream = open(  # noqa: SIM115 (It lives as long as the process.)
      kept, 'w', encoding=old.encoding, errors=old.errors, buffering=1
    )

  def close_quietly(self) -> None:
    """Leaves nothing in the buffer that the interpreter would fail to write."""
    try:
      self._stream.flush()
    except OSError:
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self._stream.fileno())
      os.close(null)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def open_closed_streams() -> None:
  """Gives closed standard streams (`>&-`) to /dev/null.

  Otherwise the next file to be opened would get the descriptor of standard
  output, and what a library writes there would end up in that file.
  """
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      opened = os.open(os.devnull, os.O_RDWR)
      if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
      os.set_inheritable(descriptor, True)
  # They live as long as the process: nothing closes them.
  sys.stdout = sys.stdout or open(os.devnull, 'w')  # noqa: SIM115
  sys.stderr = sys.stderr or open(os.devnull, 'w')  # noqa: SIM115


def log_to_terminal(
  stream: TextIO | None = None, *, quiet: bool = False
) -> Console | None:
  """Progress to `stream` (stdout), a line as it is; warnings to stderr.

  Args:
    stream: of progress.
    quiet: of what is no warning, only what is marked as RESULT.

  Returns:
    Where the lines are drawn if `stream` is a terminal: what else is drawn
    must be drawn there. None if they are written as they are.
  """
  logging.raiseExceptions = False  # A closed pipe ends no run.
  target: TextIO = sys.stdout if stream is None else stream
  console = _console(target)
  of_lines = _LineHandler if stream is None else logging.StreamHandler
  if stream is None and isinstance(target, Output):
    target.is_log = True
  out = _DrawingHandler(console) if console else of_lines(target)
  out.setLevel(logging.INFO)
  out.addFilter(lambda record: record.levelno < logging.WARNING)
  if quiet:
    out.addFilter(lambda record: hasattr(record, *RESULT))
  err = (
    _DrawingHandler(console)
    if console and sys.stderr.isatty()
    else logging.StreamHandler(sys.stderr)
  )
  err.setLevel(logging.WARNING)
  for name in LOGGERS:
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for handler in logger.handlers:  # An earlier run of this process has ended.
      handler.close()
    logger.handlers = [out, err]
  # Libraries: what they warn of, not what they do.
  for name in ('absl', 'jax'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # Orbax prints tracebacks of a failed save, which is one line of ours.
  logging.getLogger('absl').addFilter(_is_not_of_orbax)
  logging.getLogger('asyncio').addFilter(_is_of_a_program)
  return console


@contextlib.contextmanager
def restored_loggers() -> Iterator[None]:
  """Restores, at the end of the block, every logger that a run changes.

  Handlers that the block added are closed, and with them the locks of a
  workdir. A notebook keeps the logging that it had.
  """
  names = (*LOGGERS, 'absl', 'jax', 'asyncio')
  loggers = [logging.getLogger(name) for name in names]
  before = [
    (logger.level, logger.propagate, logger.handlers, logger.filters)
    for logger in loggers
  ]
  raises = logging.raiseExceptions
  for logger in loggers:  # Copies: the originals stay as they are.
    logger.handlers = [] if logger.name in LOGGERS else [*logger.handlers]
    logger.filters = [*logger.filters]
  try:
    yield
  finally:
    for logger, state in zip(loggers, before, strict=True):
      for handler in logger.handlers:
        if handler not in state[2]:
          handler.close()
      logger.setLevel(state[0])
      logger.propagate, logger.handlers, logger.filters = state[1:]
    logging.raiseExceptions = raises


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname


def _is_of_a_program(record: logging.LogRecord) -> bool:
  """Returns False for errors that Orbax reported already."""
  return 'exception was never retrieved' not in record.getMessage()


def _console(stream: TextIO | None) -> Console | None:
  """None if `stream` is no terminal, or one that cannot draw."""
  if stream is None or not stream.isatty():
    return None
  from rich.console import Console  # noqa: PLC0415 (0.1 s, for terminals alone)

  console = Console(file=stream, highlight=False, soft_wrap=True)
  return None if console.is_dumb_terminal else console


class _LineHandler(logging.StreamHandler):
  """Handler of plain lines that warns, once, if they cannot be written."""

  def __init__(self, stream: TextIO):
    super().__init__(stream)
    self._has_warned = False

  def emit(self, record):
    super().emit(record)
    error = getattr(self.stream, 'error', None)
    if error and not self._has_warned:
      self._has_warned = True
      log.warning(
        'standard output: %s; training continues, and log.txt has its lines',
        error.strerror,
      )


class _DrawingHandler(logging.Handler):
  """A line above whatever is live; NO_COLOR takes the colours away."""

  def __init__(self, console: Console):
    super().__init__()
    self.console = console

  def emit(self, record):
    try:
      text = record.getMessage()
      self.console.print(
        text, style=_style(record.levelno, text), markup=False, emoji=False
      )
    except Exception:
      self.handleError(record)


def _style(level: int, text: str) -> str:
  if level >= logging.ERROR:
    return 'red'
  if level >= logging.WARNING:
    return 'yellow'
  return 'green' if text.endswith('★') else ''
