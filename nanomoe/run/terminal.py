"""Log lines as people see them: plain where piped, coloured on a terminal."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
  from rich.console import Console

LOGGERS = ('nanomoe', 'trainers')

# log.info(..., extra=RESULT): said to who asked for quiet too.
RESULT = {'is_result': True}


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
  out = _DrawingHandler(console) if console else logging.StreamHandler(target)
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
    logger.handlers = [out, err]
  # Libraries: what they warn of, not what they do.
  for name in ('absl', 'jax'):
    logging.getLogger(name).setLevel(logging.WARNING)
  # A save that fails is told by us, in a line; by Orbax, by tracebacks.
  logging.getLogger('absl').addFilter(_is_not_of_orbax)
  logging.getLogger('asyncio').addFilter(_is_of_a_program)
  return console


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return 'orbax' not in record.pathname


def _is_of_a_program(record: logging.LogRecord) -> bool:
  """No error that Orbax, having told of another one, never asked for."""
  return 'exception was never retrieved' not in record.getMessage()


def _console(stream: TextIO | None) -> Console | None:
  """None if `stream` is no terminal, or one that cannot draw."""
  if stream is None or not stream.isatty():
    return None
  from rich.console import Console  # noqa: PLC0415 (0.1 s, for terminals alone)

  console = Console(file=stream, highlight=False, soft_wrap=True)
  return None if console.is_dumb_terminal else console


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
