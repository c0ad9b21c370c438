"""Standard streams that are closed, full, or read no more."""

import os
import subprocess
import sys

import pytest

from faults.conftest import MAIN, fault
from nanomoe import evaluate, generate, main
from tests.runs import result_of
from tests.shrunk import ROOT

# A command that logs, one that prints, and one that gets a bad flag. Each
# writes more than a pipe holds: it is still writing when its reader leaves.
LOGS = """
import logging
from nanomoe.run import cli as command, terminal

def main(_):
  terminal.log_to_terminal()
  for i in range(8_000):
    logging.getLogger('nanomoe').info('line %d', i)
  return 3

command.run(main, lambda argv: None)
"""
PRINTS = """
from nanomoe.run import cli as command

def main(_):
  print('line\\n' * 50_000)
  return 0

command.run(main, lambda argv: None)
"""
FAILS = """
from nanomoe.run import cli as command
from trainers.errors import UserError

def parse(argv):
  raise UserError('no such flag')

command.run(lambda _: 0, parse)
"""
OF_A_RUN = 'the exit code is that of the run; nothing of the interpreter'
OF_A_RESULT = '141 if the reader left, 2 and a line if it is full, 0 if closed'


def shell(command: list[str], redirections: str, **environment: str):
  """The finished command, with its own exit code in a pipe too."""
  kept = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'}
  return subprocess.run(
    [
      'bash',
      '-c',
      f'"$@" {redirections}; exit ${{PIPESTATUS[0]}}',
      'x',
      *command,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    env={'GLIBC_TUNABLES': '', **kept, **environment},
  )


def _script(text: str) -> list[str]:
  return [sys.executable, '-c', text]


@pytest.mark.reported('9')
@pytest.mark.parametrize(
  ('redirections', 'num_told'),
  [
    pytest.param(
      words, n, marks=fault(f'a command that logs, with {words}', OF_A_RUN)
    )
    for words, n in [
      ('| true', 1),
      ('> /dev/full', 1),
      ('1< /dev/null', 1),
      ('2>&1 | true', 0),
      ('> /dev/null 2> /dev/full', 0),
      ('> /dev/full 2> /dev/full', 0),
      ('>&-', 0),
      ('> /dev/null 2>&-', 0),
      ('<&- >&- 2>&-', 0),
    ]
  ],
)
def test_lines_that_nobody_gets(happened, redirections, num_told):
  done = shell(_script(LOGS), redirections)
  assert done.returncode == 3, done.stderr
  assert 'Exception ignored' not in done.stderr
  assert len(done.stderr.splitlines()) == num_told
  happened(f'its own exit code; {num_told} lines on standard error')


@pytest.mark.reported('9')
@pytest.mark.parametrize(
  ('redirections', 'code', 'num_told'),
  [
    pytest.param(
      words,
      code,
      n,
      marks=[
        fault(f'a command that prints, with {words}', OF_A_RESULT),
        pytest.mark.reported('14' if '-' in words else '9'),
      ],
    )
    for words, code, n in [
      ('| true', 141, 0),
      ('> /dev/full', 2, 1),
      ('1< /dev/null', 2, 1),
      ('> /dev/full 2> /dev/full', 2, 0),
      ('>&-', 0, 0),
      ('>&- 2>&-', 0, 0),
      ('> /dev/null 2>&-', 0, 0),
    ]
  ],
)
def test_a_result_that_nobody_gets(happened, redirections, code, num_told):
  done = shell(_script(PRINTS), redirections)
  assert done.returncode == code, done.stderr
  assert len(done.stderr.splitlines()) == num_told
  happened(f'exit code {code}; {num_told} lines on standard error')


@pytest.mark.reported('9')
@fault('PYTHONUNBUFFERED=1 and a full or closed output', 'as without it')
@pytest.mark.parametrize(
  ('text', 'redirections', 'code'),
  [
    (LOGS, '| true', 3),
    (LOGS, '> /dev/full', 3),
    (PRINTS, '| true', 141),
    (PRINTS, '> /dev/full', 2),
    (PRINTS, '>&-', 0),
  ],
)
def test_unbuffered(happened, text, redirections, code):
  done = shell(_script(text), redirections, PYTHONUNBUFFERED='1')
  assert done.returncode == code
  assert 'Exception ignored' not in done.stderr
  happened(f'exit code {code}')


@pytest.mark.reported('9')
@fault('a bad flag, while standard error is full or closed', 'exit code 2')
@pytest.mark.parametrize(
  'redirections', ['2> /dev/full', '2>&-', '>&- 2>&-', '> /dev/full 2>&1']
)
def test_an_error_that_nobody_gets(happened, redirections):
  done = shell(_script(FAILS), redirections)
  assert (done.returncode, done.stdout, done.stderr) == (2, '', '')
  happened('exit code 2, and no line on standard output instead')


@pytest.mark.reported('14')
@fault(
  'a library that writes to a closed standard output',
  'no file of the run gets what it writes',
)
def test_no_file_becomes_the_output(tmp_path, happened):
  script = (
    'import os, sys\n'
    'from nanomoe.run import cli as command\n'
    'def main(path):\n'
    '  with open(path, "w") as file:\n'
    '    for descriptor in (1, 2):\n'
    '      os.write(descriptor, b"of a library")\n'
    '    print(file.fileno(), file=file)\n'
    '  return 0\n'
    'command.run(main, lambda argv: argv[1])\n'
  )
  path = tmp_path / 'file.txt'
  done = shell([*_script(script), str(path)], '<&- >&- 2>&-')
  assert done.returncode == 0
  assert int(path.read_text()) > 2
  happened('they go to /dev/null; the file has its own')


@pytest.mark.reported('9')
@fault('--help > /dev/full, and --help | true', 'exit code 2, and 141')
def test_help_that_nobody_gets(happened):
  full = shell([*MAIN, '--help'], '> /dev/full')
  assert full.returncode == 2
  assert len(full.stderr.splitlines()) == 1
  # The reader leaves before anything is written.
  left = shell([*MAIN, '--help'], '> >(exec >&-; sleep 0.1); sleep 0.1')
  assert left.returncode in (0, 141)
  assert 'Exception ignored' not in left.stderr
  happened('exit codes 2, and 0 or 141; no line of the interpreter')


COMMANDS = {
  'main': [],
  'generate': ['--num_tokens=30'],
  'evaluate': [],
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'redirections', 'code'),
  [
    pytest.param(
      name,
      words,
      code,
      marks=[
        fault(f'{name} {words}', f'exit code {code}'),
        pytest.mark.reported('14' if '-' in words else '9'),
        *([] if (name, words) in in_default else [pytest.mark.slow]),
      ],
    )
    for in_default in [{('generate', '>&-')}]
    for name, words, code in [
      ('main', '> /dev/full', 0),
      ('main', '| true', 0),
      ('main', '>&-', 0),
      ('main', '>&- 2>&-', 0),
      ('generate', '>&-', 0),
      ('generate', '>&- 2>&-', 0),
      ('generate', '| true', 141),
      ('generate', '> /dev/full', 2),
      ('evaluate', '>&-', 0),
      ('evaluate', '>&- 2>&-', 0),
      ('evaluate', '| true', 141),
      ('evaluate', '> /dev/full', 2),
    ]
  ],
)
def test_commands(finished, happened, name, redirections, code):
  words = [sys.executable, '-m', f'nanomoe.{name}', f'--workdir={finished[0]}']
  done = shell([*words, *COMMANDS[name]], redirections)
  assert done.returncode == code, done.stderr
  assert 'Exception ignored' not in done.stderr
  assert 'Traceback' not in done.stderr
  happened(f'exit code {done.returncode}')


@pytest.mark.slow
@pytest.mark.reported('9')
@fault(
  'a run whose output is read by `head -1`',
  'it trains to its end: exit code 0, all lines in log.txt',
)
def test_a_run_goes_on_without_its_output(command, tmp_path, happened):
  workdir = tmp_path / 'run'
  done = shell(command(f'--workdir={workdir}'), '| head -1')
  assert done.returncode == 0, done.stderr
  assert len(done.stdout.splitlines()) == 1
  assert 'Exception ignored' not in done.stderr
  assert result_of(workdir)['status'] == 'done'
  assert 'done: step 12/12' in (workdir / 'log.txt').read_text()
  happened('exit code 0, status done, log.txt has all')


@pytest.mark.reported('oo')
@pytest.mark.parametrize(
  'module',
  [
    pytest.param(
      module,
      marks=fault(f'python -OO -m {module.__name__} --help', 'as without -OO'),
    )
    for module in (main, generate, evaluate)
  ],
)
def test_help_without_docstrings(run, happened, capsys, module):
  with pytest.raises(SystemExit):
    module._parse([module.__name__, '--help'])
  stripped = run([sys.executable, '-OO', '-m', module.__name__, '--help'])
  assert stripped.returncode == 0
  assert stripped.stdout == capsys.readouterr().out
  assert stripped.stdout.startswith(f'python -m {module.__name__} --')
  happened('the same text')
