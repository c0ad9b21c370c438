"""A real process on a real (pseudo) terminal; colours; quiet."""

import fcntl
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest

from nanomoe.run import terminal
from tests.shrunk import ROOT

COLOUR = re.compile(r'\x1b\[[0-9;]*3[0-9][0-9;]*m')


class Terminal:
  """A pseudo-terminal of 100 columns; `shown` is all that was written to it."""

  def __init__(self):
    self._master, self.slave = os.openpty()
    size = struct.pack('HHHH', 24, 100, 0, 0)
    fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)
    self.shown = ''

  def read_until(self, text: str) -> None:
    while text not in self.shown:
      self.shown += os.read(self._master, 65536).decode(errors='replace')

  def read(self) -> str:
    """What is there already; the rest, once the last writer has closed."""
    os.set_blocking(self._master, False)
    try:
      while data := os.read(self._master, 65536):
        self.shown += data.decode(errors='replace')
    except (BlockingIOError, OSError):  # EIO: closed.
      pass
    return self.shown


@pytest.fixture
def tty():
  return Terminal()


def _start(words, tty, **environment):
  """With all of its streams on the terminal."""
  kept = {k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'TERM')}
  process = subprocess.Popen(
    words,
    cwd=ROOT,
    stdin=tty.slave,
    stdout=tty.slave,
    stderr=tty.slave,
    env={**kept, 'TERM': 'xterm-256color', **environment},
  )
  os.close(tty.slave)
  return process


@pytest.mark.slow
def test_a_bar_and_ctrl_c(tty, command, tmp_path):
  """It lives below the lines, and leaves what was saved and how to go on."""
  workdir = tmp_path / 'run'
  many = {'num_train_steps': 1_000_000, 'eval_interval': 500_000}
  process = _start(command(f'--workdir={workdir}', changes=many), tty)
  tty.read_until('steps/s  ETA')
  process.send_signal(signal.SIGINT)
  assert process.wait(timeout=60) == 75
  tty.read()
  assert '━' in tty.shown and '/1000000' in tty.shown
  assert '\x1b[?25h' in tty.shown  # The cursor is there, whatever happens.
  assert tty.shown.rindex('\x1b[?25h') > tty.shown.rfind('\x1b[?25l')
  *_, saved, resume = tty.shown.rstrip().splitlines()
  assert 'interrupted by SIGINT' in saved and 'is saved' in saved
  assert resume == f'resume with: python -m nanomoe.main --workdir={workdir}'
  assert '━' not in tty.shown[tty.shown.rindex('interrupted by') :]
  log = (workdir / 'log.txt').read_text()
  assert '\x1b' not in log and 'interrupted by SIGINT' in log


@pytest.mark.slow
def test_quiet_says_where_the_result_is(run, finished):
  workdir, _ = finished
  words = [sys.executable, '-m', 'nanomoe.main', f'--workdir={workdir}', '-q']
  process = run(words)
  (line,) = process.stdout.splitlines()
  assert line.startswith('done: ') and line.endswith(str(workdir))
  assert process.stderr == ''


def test_piped_output_has_no_escapes(finished):
  _, process = finished
  assert '★' in process.stdout
  assert '\x1b' not in process.stdout + process.stderr


@pytest.fixture
def loggers():
  """As they were before the test."""
  names = [*terminal.LOGGERS, 'absl', 'asyncio', 'jax']
  before = {
    name: (logger.handlers, logger.filters, logger.level, logger.propagate)
    for name in names
    if (logger := logging.getLogger(name))
  }
  raises = logging.raiseExceptions
  yield
  logging.raiseExceptions = raises
  for name, (handlers, filters, level, propagate) in before.items():
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = handlers, propagate
    logger.filters = filters
    logger.setLevel(level)


@pytest.mark.parametrize('no_color', ['', '1'])
def test_colours_are_few_and_can_be_none(tty, loggers, monkeypatch, no_color):
  monkeypatch.setenv('TERM', 'xterm-256color')
  monkeypatch.setenv('NO_COLOR', no_color)
  with os.fdopen(tty.slave, 'w') as stream:
    monkeypatch.setattr(sys, 'stderr', stream)
    assert terminal.log_to_terminal(stream)
    log = logging.getLogger('nanomoe.test')
    log.info('plain [red]1/2[/red] :smile: %s', 'x' * 150)
    log.info('best  ★')
    log.warning('careful')
    log.error('no')
    shown = tty.read()
  plain, *others = shown.replace('\r', '').splitlines()
  assert plain == f'plain [red]1/2[/red] :smile: {"x" * 150}'
  assert [bool(COLOUR.search(x)) for x in others] == [not no_color] * 3
  assert re.sub(r'\x1b\[[0-9;]*m', '', '\n'.join(others)) == (
    'best  ★\ncareful\nno'
  )


def test_what_orbax_logs_of_a_failed_save_is_not_shown(loggers, caplog):
  terminal.log_to_terminal()
  for name, place, told in (
    ('absl', 'orbax/checkpoint/x.py', 'a traceback'),
    ('absl', 'elsewhere/y.py', 'mine'),
    ('asyncio', 'asyncio/events.py', 'Task exception was never retrieved'),
    ('asyncio', 'asyncio/events.py', 'also mine'),
  ):
    record = logging.LogRecord(name, logging.ERROR, place, 1, told, (), None)
    logging.getLogger(name).handle(record)
  assert [r.message for r in caplog.records] == ['mine', 'also mine']


def test_a_terminal_that_cannot_draw_gets_lines(tty, loggers, monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  with os.fdopen(tty.slave, 'w') as stream:
    assert terminal.log_to_terminal(stream) is None
    logging.getLogger('nanomoe.test').info('best  ★')
    assert tty.read() == 'best  ★\r\n'
