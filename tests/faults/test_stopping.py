"""However a process ends, the run ends where an undisturbed one does."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from faults.conftest import same_end, steps_of
from tests.runs import result_of
from tests.shrunk import ROOT


def case(what, *arguments, often=False):
  """Returns a case; `often` is for those of continuous integration."""
  marks = [pytest.mark.fault(injected=what), pytest.mark.slow]
  marks += [] if often else [pytest.mark.full]
  return pytest.param(*arguments, marks=marks)


@pytest.mark.fault(promised='resumed, it ends bitwise like an undisturbed run')
@pytest.mark.parametrize(
  ('fault', 'changes'),
  [
    case('SIGKILL in the first step', 'step 1 KILL', {}),
    case('SIGKILL in step 7', 'step 7 KILL', {}, often=True),
    case('SIGKILL in the first asynchronous save', 'save 1 KILL', {}),
    case(
      'SIGKILL in the second asynchronous save', 'save 2 KILL', {}, often=True
    ),
    case(
      'SIGKILL between the commit of a checkpoint and its manifest',
      'manifest 2 KILL',
      {},
      often=True,
    ),
    case('the same of the first checkpoint', 'manifest 1 KILL', {}),
    case(
      'SIGKILL while an old checkpoint is half deleted',
      'collection 1 KILL',
      {'checkpoint.keep_latest': 1},
    ),
    case('SIGKILL in an evaluation', 'evaluation 2 KILL', {}),
    case('SIGKILL in the final text', 'sample 3 KILL', {}),
  ],
)
def test_killed(start, tmp_path, finished, happened, fault, changes):
  workdir = tmp_path / 'run'
  first = start(workdir, fault=fault, changes=changes)
  assert first.end() == -signal.SIGKILL, first.output[-2000:]
  left = steps_of(workdir)
  second = start(workdir, new=False)
  assert second.end() == 0, second.output[-2000:]
  assert 'Traceback' not in second.output
  same_end(workdir, finished[0])
  happened(f'checkpoints {left} were left; equal')


@pytest.mark.slow
@pytest.mark.fault(
  injected='SIGKILL at five random moments of one run',
  promised='resumed, it ends bitwise like an undisturbed run',
)
def test_killed_at_random(start, tmp_path, finished, happened):
  workdir = tmp_path / 'run'
  seed = int(os.environ.get('NANOMOE_TEST_SEED', time.time()))
  print(f'NANOMOE_TEST_SEED={seed} repeats this')
  chance = random.Random(seed)
  left = []
  log = workdir / 'metrics.jsonl'

  def num_lines():
    return log.read_text().count('\n') if log.exists() else 0

  for kill in range(5):
    process = start(workdir, new=kill == 0)
    goal = min(num_lines() + chance.randint(0, 2), 8)
    process.until(lambda goal=goal: num_lines() >= goal and log.exists())
    time.sleep(chance.uniform(0, 0.5))
    process.signal(signal.SIGKILL)
    process.end()
    left.append(steps_of(workdir)[-1:])
  last = start(workdir, new=False)
  assert last.end() == 0, last.output[-2000:]
  same_end(workdir, finished[0])
  happened(f'after {left}: equal')


@pytest.mark.parametrize(
  ('fault', 'code', 'step'),
  [
    case('SIGTERM in a step', 'step 6 TERM', 75, 6, often=True),
    case('SIGTERM in an evaluation', 'evaluation 2 TERM', 75, 8),
    case('SIGTERM in a save', 'save 2 TERM', 75, 8, often=True),
    case('SIGTERM in the final text', 'sample 3 TERM', 75, 12),
    case('SIGTERM in the last step', 'step 12 TERM', 75, 12),
    case('Ctrl-C in a step', 'step 6 INT', 75, 6),
    case('Ctrl-C in an evaluation', 'evaluation 2 INT', 75, 8, often=True),
  ],
)
@pytest.mark.fault(promised='exit 75, all is saved; resumed, bitwise the same')
def test_interrupted(start, tmp_path, finished, happened, fault, code, step):
  workdir = tmp_path / 'run'
  first = start(workdir, fault=fault)
  assert first.end() == code, first.output[-2000:]
  name = f'SIG{fault.split()[-1]}'
  assert f'interrupted by {name}; step {step}/12 is saved' in first.output
  assert 'Traceback' not in first.output
  assert steps_of(workdir)[-1] == step
  result = result_of(workdir)
  assert (result['status'], result['step']) == ('interrupted', step)
  second = start(workdir, new=False)
  assert second.end() == 0, second.output[-2000:]
  same_end(workdir, finished[0])
  happened(f'exit {code}, step {step} saved; equal')


@pytest.mark.slow
@pytest.mark.fault(
  injected='SIGTERM when all is done, before the files are closed',
  promised='exit 0: there is nothing to resume',
)
def test_interrupted_at_the_end(start, tmp_path, finished, happened):
  workdir = tmp_path / 'run'
  process = start(workdir, fault='end 1 TERM')
  assert process.end() == 0, process.output[-2000:]
  same_end(workdir, finished[0])
  happened('exit 0; equal')


@pytest.mark.slow
@pytest.mark.fault(
  injected='SIGTERM while the run is being built',
  promised='exit 75 in a line; started again, bitwise the same',
)
def test_interrupted_while_starting(start, tmp_path, finished, happened):
  workdir = tmp_path / 'run'
  first = start(workdir, fault='start 1 TERM')
  assert first.end() == 75, first.output[-2000:]
  assert first.output.splitlines()[-1].startswith('interrupted')
  assert 'Traceback' not in first.output
  second = start(workdir)
  assert second.end() == 0, second.output[-2000:]
  same_end(workdir, finished[0])
  happened("exit 75, 'interrupted'; equal")


@pytest.mark.slow
@pytest.mark.parametrize(
  ('fault', 'code'),
  [
    case('SIGTERM twice in a save', 'save 2 TERM,TERM', 143, often=True),
    case('SIGTERM twice in an evaluation', 'evaluation 2 TERM,TERM', 143),
    case('Ctrl-C twice', 'step 6 INT,INT', 130, often=True),
    case('SIGTERM, then Ctrl-C', 'step 6 TERM,INT', 130),
  ],
)
@pytest.mark.fault(
  promised='the second leaves at once; resumed, bitwise the same'
)
def test_interrupted_twice(start, tmp_path, finished, happened, fault, code):
  workdir = tmp_path / 'run'
  first = start(workdir, fault=fault)
  assert first.end() == code, first.output[-2000:]
  second = start(workdir, new=False)
  assert second.end() == 0, second.output[-2000:]
  same_end(workdir, finished[0])
  happened(f'exit {code}; equal')


@pytest.mark.fault(
  injected='SIGTERM twice inside one long call of XLA',
  promised='the second leaves at once: no handler of Python gets a turn',
)
def test_the_second_signal_does_not_wait_for_a_computation(happened):
  script = """
import jax, jax.numpy as jnp
from trainers.signals import Interrupt
spin = jax.jit(lambda x: jax.lax.while_loop(
  lambda x: x > 0, lambda x: x * 1.0000001 + 1e-9, x))
with Interrupt().listening():
  print('computing', flush=True)
  jax.block_until_ready(spin(jnp.ones(())))
"""
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  try:
    assert process.stdout.readline() == 'computing\n'
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    seconds = time.monotonic() - start
  finally:
    process.kill()
    process.wait()
  assert seconds < 5
  happened(f'exit 143 after {seconds:.1f} s')
