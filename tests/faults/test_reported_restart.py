"""A command starts its own process again for huge pages, and no other one."""

import os
import subprocess
import sys

import pytest

from faults.conftest import fault
from nanomoe.run import process
from tests.shrunk import ROOT

pytestmark = [
  pytest.mark.reported('11'),
  pytest.mark.skipif(
    sys.platform != 'linux', reason='only glibc has the setting'
  ),
]

JOB = """
import os, sys
from nanomoe.run import cli as command

def main(_):
  print('tunables', os.environ.get('GLIBC_TUNABLES'))
  return 0

if __name__ == '__main__':
  print('begins', sys.flags.optimize, sys.flags.utf8_mode, sys.warnoptions)
  sys.stdout.flush()
  command.run(main, lambda argv: None)
"""
HOST = """
import runpy, signal, sys
print('side effect', flush=True)
before = sys.stdout, sys.stderr, sys.unraisablehook, [
  signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
for _ in range(2):
  try:
    CALL
  except SystemExit as left:
    assert not left.code, left.code
assert before == (sys.stdout, sys.stderr, sys.unraisablehook, [
  signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
print('goes on')
"""
MODULE = "runpy.run_module('job', run_name='__main__', alter_sys=True)"
KEPT = 'it is not started again, runs the command twice, and goes on'


@pytest.fixture
def python(tmp_path):
  """python(*words, stdin='', **environment) -> its lines."""
  (tmp_path / 'job.py').write_text(JOB)
  kept = {
    k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'GLIBC'))
  }

  def start(*words, stdin='', **environment):
    done = subprocess.run(
      [sys.executable, *words],
      cwd=tmp_path,
      input=stdin,
      capture_output=True,
      text=True,
      timeout=60,
      env={**kept, 'PYTHONPATH': f'{tmp_path}:{ROOT}', **environment},
    )
    assert 'Error' not in done.stderr, done.stderr
    return done.stdout.splitlines()

  return start


@fault(
  'python -X utf8 -W ignore -OOm MODULE',
  'started again once, with huge pages and the same options',
)
def test_a_command_starts_again(python, happened):
  begins, again, tunables = python('-X', 'utf8', '-W', 'ignore', '-OOm', 'job')
  assert begins == again == "begins 2 1 ['ignore']"
  assert tunables == 'tunables glibc.malloc.hugetlb=1'
  happened('once, with -X, -W and -OO')


@pytest.mark.parametrize(
  ('call', 'how'),
  [
    pytest.param(call, how, marks=fault(f'a command run by {what}', KEPT))
    for what, call, how in [
      ('runpy.run_module in a script', MODULE, 'file'),
      (
        'runpy.run_path in a script',
        "runpy.run_path('job.py', run_name='__main__')",
        'file',
      ),
      ('a script on standard input', MODULE, 'stdin'),
      ('python -c', MODULE, '-c'),
      ('a module that is run by -m', MODULE, '-m'),
      ('exec, as a notebook does', "exec(open('job.py').read())", 'file'),
    ]
  ],
)
def test_a_host_is_not_started_again(python, tmp_path, happened, call, how):
  text = HOST.replace('CALL', call)
  (tmp_path / 'host.py').write_text(text)
  if how == 'stdin':
    lines = python('-', stdin=text)
  else:
    lines = python(
      *{'file': ['host.py'], '-c': ['-c', text], '-m': ['-m', 'host']}[how]
    )
  assert [line.split()[0] for line in lines] == [
    'side',
    *['begins', 'tunables'] * 2,
    'goes',
  ]
  assert lines[2] == 'tunables None'
  happened('one process; streams and signal handlers are as before')


@pytest.mark.parametrize(
  ('words', 'environment'),
  [
    pytest.param(
      words, environment, marks=fault(what, 'the command begins once')
    )
    for what, words, environment in [
      ('a debugger: python -m pdb -m', ['-m', 'pdb', '-c', 'c', '-m'], {}),
      ('a profiler: python -m cProfile -m', ['-m', 'cProfile', '-m'], {}),
      ('python -i -m', ['-i', '-m'], {}),
      ('PYTHONINSPECT=1 python -m', ['-m'], {'PYTHONINSPECT': '1'}),
      ('a debugger that sitecustomize starts', ['-m'], {'TRACED': '1'}),
    ]
  ],
)
def test_debuggers(python, tmp_path, happened, words, environment):
  if 'TRACED' in environment:
    (tmp_path / 'sitecustomize.py').write_text(
      'import sys\nsys.settrace(lambda *_: None)\n'
    )
  lines = python(*words, 'job', **environment)
  assert sum(line.startswith('begins') for line in lines) == 1
  assert 'tunables None' in lines
  happened('once')


@fault(
  'a command in a child of multiprocessing (spawn)', 'the child begins once'
)
def test_children(python, tmp_path, happened):
  (tmp_path / 'parent.py').write_text(
    'import multiprocessing, runpy\n'
    'def child():\n'
    "  runpy.run_module('job', run_name='__main__', alter_sys=True)\n"
    "if __name__ == '__main__':\n"
    "  process = multiprocessing.get_context('spawn').Process(target=child)\n"
    '  process.start()\n'
    '  process.join()\n'
    "  print('exit code', process.exitcode)\n"
  )
  lines = python('parent.py')
  assert [line.split()[0] for line in lines] == ['begins', 'tunables', 'exit']
  assert lines[1:] == ['tunables None', 'exit code 0']
  happened('once')


@pytest.mark.parametrize(
  ('words', 'module'),
  [
    ('python -m a.b --c', 'a.b'),
    ('python -ma.b -c x', 'a.b'),
    ('python -u -OOm a.b', 'a.b'),
    ('python -X m -Wignore -W c -Xdev -I -m a.b', 'a.b'),
    ('python --check-hash-based-pycs always -m a.b', 'a.b'),
    ('python -c x -m a.b', None),
    ('python script.py -m a.b', None),
    ('python - -m a.b', None),
    ('python -Ic x -m a.b', None),
    ('python', None),
    ('python -m', None),
  ],
)
def test_the_module_of_a_command_line(words, module):
  assert process._module_in(words.split()) == module
