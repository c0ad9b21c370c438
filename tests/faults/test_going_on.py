"""Going on in a workdir: by whom, and with what."""

import fcntl
import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest

from faults.conftest import same_end, steps_of
from nanomoe.config import resume
from tests.runs import metrics_of, result_of
from trainers.checkpoint import reader


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of a finished run."""
  return pathlib.Path(shutil.copytree(finished[0], tmp_path / 'run'))


def errors(process) -> list[str]:
  """What was told by a process that ended with 2."""
  assert process.end() == 2, process.output[-3000:]
  assert 'Traceback' not in process.output
  lines = process.output.splitlines()
  return [line for line in lines if line.startswith('error: ')]


def everything(workdir) -> dict:
  return {
    path.relative_to(workdir): path.read_bytes()
    for path in sorted(workdir.rglob('*'))
    if path.is_file() and path.name != 'log.txt'
  }


# What may not change.


@pytest.mark.parametrize(
  ('word', 'name', 'told'),
  [
    pytest.param(
      '--config.seed=1',
      'seed',
      'seed was 0 in this run, and is 1 now',
      marks=pytest.mark.fault(injected='another seed'),
    ),
    pytest.param(
      '--config.batch_size=2',
      'batch_size',
      'batch_size was 4 in this run, and is 2 now',
      marks=pytest.mark.fault(injected='another batch size'),
    ),
    pytest.param(
      '--config.data.tokenizer.type=Bytes',
      'tokenizer',
      "data.tokenizer.type was 'Characters' in this run, and is 'Bytes' now",
      marks=pytest.mark.fault(injected='another tokenizer'),
    ),
    pytest.param(
      '--config.data.path=OTHER',
      'data',
      'data.path=',
      marks=pytest.mark.fault(injected='another text'),
    ),
    pytest.param(
      '--config.model.num_layers=3',
      None,
      'model.num_layers was 2 in this run, and is 3 now',
      marks=pytest.mark.fault(injected='another architecture'),
    ),
  ],
)
@pytest.mark.fault(promised='refused, exit 2: what was, is, and allows it')
def test_what_may_not_change(
  start, workdir, tmp_path, corpus, happened, word, name, told
):
  (tmp_path / 'other.txt').write_text(corpus.read_text()[::-1])
  before = everything(workdir)
  process = start(
    workdir, word.replace('OTHER', str(tmp_path / 'other.txt')), new=False
  )
  (line,) = errors(process)
  assert told in line
  assert (f'--allow_changed={name}' in line) == (name is not None)
  assert everything(workdir) == before
  happened(line.replace(str(tmp_path), '...'))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('words', 'allow'),
  [
    pytest.param(
      ['--config.seed=1', '--config.batch_size=2'],
      'seed,batch_size',
      marks=pytest.mark.fault(
        injected='another seed and batch size, --allow_changed=seed,batch_size'
      ),
    ),
    pytest.param(
      ['--config.data.path=OTHER'],
      'data',
      marks=pytest.mark.fault(injected='another text, --allow_changed=data'),
    ),
  ],
)
@pytest.mark.fault(promised='goes on from the same weights; told in the log')
def test_what_is_allowed_to_change(
  start, workdir, tmp_path, corpus, happened, words, allow
):
  (tmp_path / 'other.txt').write_text(corpus.read_text()[::-1])
  words = [w.replace('OTHER', str(tmp_path / 'other.txt')) for w in words]
  more = '--config.num_train_steps=14'
  process = start(workdir, *words, more, f'--allow_changed={allow}', new=False)
  assert process.end() == 0, process.output[-2000:]
  told = [x for x in process.output.splitlines() if '--allow_changed=' in x]
  assert [x.rpartition('--allow_changed=')[2] for x in told] == allow.split(',')
  assert result_of(workdir)['step'] == 14
  # From then on it is the run's.
  again = start(workdir, '--config.num_train_steps=15', new=False)
  assert again.end() == 0, again.output[-2000:]
  happened(told[0].strip())


@pytest.mark.slow
@pytest.mark.fault(
  injected='a tokenizer with another vocabulary, --allow_changed=tokenizer',
  promised='refused: the differing arrays are named; the run stays as it was',
)
def test_a_tokenizer_that_does_not_fit(start, workdir, happened):
  before = everything(workdir)
  process = start(
    workdir,
    '--config.data.tokenizer.type=Bytes',
    '--allow_changed=tokenizer',
    '--config.num_train_steps=14',
    new=False,
  )
  assert process.end() == 2, process.output[-2000:]
  assert 'Traceback' not in process.output
  assert 'the checkpoint is of another architecture' in process.output
  assert 'float32[20, 16] in the checkpoint' in process.output
  after = everything(workdir)
  changed = {
    str(path)
    for path in before.keys() | after.keys()
    if before.get(path) != after.get(path)
  }
  assert not changed
  assert start(workdir, new=False).end() == 0
  happened('exit 2; float32[20, 16] in the checkpoint, [256, 16] in this model')


@pytest.mark.fault(
  injected='--allow_changed=everything',
  promised='refused, exit 2: what is allowed',
)
def test_allow_changed_is_checked(start, workdir, happened):
  (line,) = errors(start(workdir, '--allow_changed=everything', new=False))
  assert '--allow_changed=everything' in line
  assert all(name in line for name in resume.ALLOWABLE)
  happened(line)


@pytest.mark.parametrize(
  ('name', 'edit', 'told'),
  [
    pytest.param(
      'config.json',
      {'seed': 5},
      'seed=5: ',
      marks=[
        pytest.mark.slow,
        pytest.mark.fault(injected='config.json edited: another seed'),
      ],
    ),
    pytest.param(
      'vocabulary.json',
      {'characters': '\nabcdefghijklmnopqrst'},
      'is float32[20, 16] in the checkpoint, float32[21, 16] in this model',
      marks=[
        pytest.mark.slow,
        pytest.mark.fault(injected='vocabulary.json edited: a letter more'),
      ],
    ),
  ],
)
@pytest.mark.fault(promised='refused, exit 2: the checkpoint knows better')
def test_an_edited_file_is_found(start, workdir, happened, name, edit, told):
  path = workdir / name
  path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
  lines = errors(start(workdir, new=False))
  assert any(told in line for line in lines), lines
  happened(next(line for line in lines if told in line))


# What may.


@pytest.mark.slow
@pytest.mark.fault(
  injected='another learning rate',
  promised='goes on, and the change is logged',
)
def test_a_changed_learning_rate_is_logged(start, workdir, happened):
  process = start(
    workdir,
    '--config.optimizer.learning_rate=1e-3',
    '--config.num_train_steps=14',
    new=False,
  )
  assert process.end() == 0, process.output[-2000:]
  line = 'changed: optimizer.learning_rate from 0.0003 to 0.001'
  assert line in process.output
  assert metrics_of(workdir)[-1]['step'] == 14
  rates = [m['learning_rate'] for m in metrics_of(workdir) if 'train/loss' in m]
  assert rates[-2:] == [pytest.approx(3e-4), pytest.approx(1e-3)]
  happened(line)


@pytest.mark.slow
@pytest.mark.fault(
  injected='a finished run started again, with more steps, with fewer',
  promised='nothing to do, exit 0; it goes on; refused, and as it was',
)
def test_a_finished_run(start, workdir, tmp_path, finished, happened):
  assert start(workdir, new=False).end() == 0
  same_end(workdir, finished[0])
  more = '--config.num_train_steps=16'
  process = start(workdir, more, new=False)
  assert process.end() == 0, process.output[-2000:]
  whole = tmp_path / 'whole'
  process = start(whole, changes={'num_train_steps': 16})
  assert process.end() == 0, process.output[-2000:]
  found, wanted = (
    reader.read(directory / 'checkpoints', '16')[0]
    for directory in (workdir, whole)
  )
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  assert metrics_of(workdir) == metrics_of(whole)
  fewer = start(workdir, '--config.num_train_steps=3', new=False)
  assert fewer.end() == 2
  assert 'num_train_steps=3: this run has done 16' in fewer.output
  assert start(workdir, new=False).end() == 0
  happened('12 of 12, exit 0; 16 as in one run, bitwise; exit 2, then exit 0')


# By whom.


@pytest.mark.slow
@pytest.mark.fault(
  injected='a second trainer in the same workdir',
  promised='refused, exit 2; the first is not disturbed',
)
def test_a_second_trainer_is_refused(start, tmp_path, finished, happened):
  workdir = tmp_path / 'run'
  first = start(workdir, fault='step 5 STOP')
  _, status = os.waitpid(first.process.pid, os.WUNTRACED)
  assert os.WIFSTOPPED(status), first.output[-2000:]
  (line,) = errors(start(workdir, new=False))
  assert 'another process' in line
  first.signal(signal.SIGCONT)
  assert first.end() == 0, first.output[-2000:]
  same_end(workdir, finished[0])
  happened(line.replace(str(tmp_path), '...'))


@pytest.mark.slow
@pytest.mark.fault(
  injected='log.txt, which is locked, deleted or replaced in a running workdir',
  promised='a second trainer is still refused',
)
def test_the_lock_is_not_a_file_that_can_go(start, tmp_path, happened):
  workdir = tmp_path / 'run'
  first = start(workdir, changes={'num_train_steps': 100_000})
  first.until(lambda: (workdir / 'metrics.jsonl').exists())
  (workdir / 'log.txt').unlink()
  (line,) = errors(start(workdir, new=False))
  assert 'another process' in line
  first.signal(signal.SIGKILL)
  first.end()
  happened('refused')


@pytest.mark.slow
@pytest.mark.fault(
  injected='a lock that a process killed by SIGKILL left behind',
  promised='it holds nobody: the run goes on',
)
def test_a_stale_lock(start, workdir, happened):
  process = start(workdir, new=False)
  process.until(lambda: 'watch it' in process.output)
  process.signal(signal.SIGKILL)
  process.end()
  with open(workdir / 'log.txt', 'a') as file:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # It is free.
  assert start(workdir, new=False).end() == 0
  assert steps_of(workdir)[-1] == 12
  happened('exit 0')
