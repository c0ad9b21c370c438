"""SIGHUP, SIGUSR1 and SIGUSR2 save a run, as SIGTERM does."""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time

import pytest
from regression import make_trainer

from faults.conftest import fault, same_end
from tests.runs import At, result_of
from tests.shrunk import ROOT
from trainers import callbacks
from trainers.signals import Interrupt

pytestmark = pytest.mark.reported('sighup')

NAMES = ('SIGHUP', 'SIGUSR1', 'SIGUSR2')
SAVED = 'the newest step is saved, the status is interrupted'

# A command before its training begins: in Python, and in a long call of C.
WAITS = """
import hashlib, time
from nanomoe.run import cli as command

def main(_):
  print('begun', flush=True)
  CALL
  return 0

command.run(main, lambda argv: None)
"""


@pytest.fixture(autouse=True)
def default_handlers():
  """As if no `nohup` had started the tests."""
  numbers = [signal.Signals[name] for name in NAMES]
  before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
  yield
  for number, handler in zip(numbers, before, strict=True):
    signal.signal(number, handler)


def python(text: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-c', text],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=fault(f'{name} in a step', SAVED))
    for name in NAMES
  ],
)
def test_training_is_saved(tmp_path, happened, name):
  number = signal.Signals[name]
  trainer = make_trainer(
    tmp_path,
    callbacks=[
      At(lambda _: os.kill(os.getpid(), number), 5),
      callbacks.Checkpoints(100),
    ],
  )
  assert trainer.fit() == 'interrupted'
  assert trainer.stop_reason == name
  steps = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert '5' in steps
  assert signal.getsignal(number) == signal.SIG_DFL
  happened('step 5 is saved, interrupted')


@fault(
  'SIGHUP under nohup, SIGUSR1 where a program uses it',
  'left alone: training goes on',
)
def test_what_is_ignored_stays_ignored(happened):
  seen = []
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  signal.signal(signal.SIGUSR1, lambda *_: seen.append('mine'))
  with Interrupt().listening() as interrupt:
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert not interrupt
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt
  assert seen == ['mine']
  happened('both are left alone; SIGTERM still saves')


@pytest.mark.parametrize(
  ('signals', 'code'),
  [
    pytest.param(
      signals, code, marks=fault(f'{signals} in a step', f'exit code {code}')
    )
    for signals, code in [
      ('SIGHUP, then SIGTERM', 143),
      ('SIGTERM, then SIGHUP', 129),
      ('SIGUSR1, then SIGUSR1', 128 + signal.SIGUSR1),
      ('SIGHUP, then SIGUSR2', 128 + signal.SIGUSR2),
    ]
  ],
)
def test_the_second_leaves_at_once(happened, signals, code):
  first, second = signals.split(', then ')
  done = python(
    'import os, signal\n'
    'from trainers.signals import Interrupt\n'
    'with Interrupt().listening():\n'
    f'  os.kill(os.getpid(), signal.{first})\n'
    '  print("still here", flush=True)\n'
    f'  os.kill(os.getpid(), signal.{second})\n'
    '  print("never")\n'
  )
  assert (done.stdout, done.returncode) == ('still here\n', code)
  happened(f'exit code {code}')


@fault(
  'SIGHUP twice at once, as a login shell sends it when its terminal closes',
  'both are one: the run is saved; a later one leaves at once',
)
def test_a_hangup_comes_twice(happened):
  done = python(
    'import os, signal, time\n'
    'from trainers.signals import Interrupt\n'
    'with Interrupt().listening() as interrupt:\n'
    '  for _ in range(2):\n'
    '    os.kill(os.getpid(), signal.SIGHUP)\n'
    '    time.sleep(0.01)\n'
    '  print(interrupt.name, flush=True)\n'
    '  time.sleep(1.1)\n'
    '  os.kill(os.getpid(), signal.SIGHUP)\n'
    '  print("never")\n'
  )
  assert (done.stdout, done.returncode) == ('SIGHUP\n', 129)
  happened('a flag; 129 after a second')


@pytest.mark.parametrize(
  ('names', 'call', 'code'),
  [
    pytest.param(
      names,
      call,
      code,
      marks=fault(f'{" and ".join(names)} before training begins', told),
    )
    for names, call, code, told in [
      (['SIGHUP'], 'time.sleep(60)', 75, 'one line, exit code 75'),
      (['SIGUSR1'], 'time.sleep(60)', 75, 'one line, exit code 75'),
      (
        ['SIGUSR1', 'SIGTERM'],
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
        143,
        'the second leaves at once, also inside a long call of C',
      ),
    ]
  ],
)
def test_before_training_begins(happened, names, call, code):
  process = subprocess.Popen(
    [sys.executable, '-c', WAITS.replace('CALL', call)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout.readline() == 'begun\n'
    time.sleep(0.2)
    for name in names:
      process.send_signal(signal.Signals[name])
      time.sleep(0.3)
    assert process.wait(30) == code
    told = process.stderr.read()
  finally:
    process.kill()
    process.communicate()
  assert len(told.splitlines()) == (len(names) == 1)
  happened(f'exit code {code}')


@pytest.mark.slow
@pytest.mark.parametrize(
  'injected',
  [
    pytest.param(
      words,
      marks=[
        fault(f'SIG{words.split()[-1]}, a process: {words}', SAVED),
        *([pytest.mark.full] if 'step' in words else []),
      ],
    )
    for words in ['step 6 USR1', 'evaluation 2 HUP', 'save 2 USR2']
  ],
)
def test_a_process(start, tmp_path, finished, happened, injected):
  workdir = tmp_path / 'run'
  first = start(workdir, fault=injected)
  assert first.end() == 75, first.output[-2000:]
  assert result_of(workdir)['status'] == 'interrupted'
  second = start(workdir, new=False)
  assert second.end() == 0, second.output[-2000:]
  same_end(workdir, finished[0])
  happened('exit code 75; resumed, bitwise the same')


@pytest.mark.slow
@fault(
  'the terminal of a login shell closes while a run trains in it',
  'the run is saved: interrupted by SIGHUP',
)
def test_a_terminal_that_closes(command, tmp_path, happened):
  workdir = tmp_path / 'run'
  many = {'num_train_steps': 1_000_000, 'eval_interval': 500_000}
  words = shlex.join(command(f'--workdir={workdir}', changes=many))
  child, terminal = pty.fork()
  if not child:
    os.chdir(ROOT)
    os.execvp('bash', ['bash', '-l', '-i'])
  os.write(terminal, f'{words}\n'.encode())
  log, end = workdir / 'metrics.jsonl', time.monotonic() + 100
  while not (log.exists() and log.stat().st_size):
    assert time.monotonic() < end
    if select.select([terminal], [], [], 0.05)[0]:
      os.read(terminal, 65536)
  os.close(terminal)
  os.waitpid(child, 0)
  # The log's line is the last thing that the process writes.
  while 'interrupted by' not in (workdir / 'log.txt').read_text():
    assert time.monotonic() < end
    time.sleep(0.05)
  assert result_of(workdir)['status'] == 'interrupted'
  assert 'interrupted by SIGHUP' in (workdir / 'log.txt').read_text()
  happened('saved')
