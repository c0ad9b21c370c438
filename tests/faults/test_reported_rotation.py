"""Checkpoints are read while a trainer deletes, moves and replaces them."""

import pathlib
import shutil
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from faults.conftest import fault, steps_of
from nanomoe import experiment
from nanomoe.evaluate import evaluate
from nanomoe.run import workdir as workdir_lib
from trainers.checkpoint import reader
from trainers.checkpoint.checkpointer import Checkpointer
from trainers.errors import UserError

pytestmark = pytest.mark.reported('17')


def tree(number):
  random = np.random.default_rng(number)
  return {'x': jnp.asarray(random.normal(size=1000)), 'y': jnp.ones(7)}


class Run:
  """A trainer's checkpoints, and what it does to them."""

  def __init__(self, workdir: pathlib.Path):
    self.directory = workdir / 'checkpoints'
    self.checkpointer = Checkpointer(self.directory, keep_latest=1)

  def save(self, step, best=None, seed=None):
    """Deletes what is neither the best nor the newest."""
    self.checkpointer.save(
      step,
      tree(step if seed is None else seed),
      {'best': best and [best, 0.5]},
      best,
    )
    self.checkpointer.wait()

  def read(self, step):
    """The step of what is read, which is compared to what was saved."""
    arrays, meta = reader.read(self.directory, step)
    np.testing.assert_array_equal(arrays['x'], tree(meta['step'])['x'])
    return meta['step']

  def delete_half(self, step):
    """Half of the files; returns a function that deletes the rest."""
    path = self.directory / str(step)
    files = sorted(p for p in path.rglob('*') if p.is_file())
    for file in files[::2]:
      file.unlink()
    return lambda: shutil.rmtree(path)

  def empty(self, step):
    """All files, and no directory, as Orbax leaves it for a moment."""
    path = self.directory / str(step)
    for file in [p for p in path.rglob('*') if p.is_file()]:
      file.unlink()
    return lambda: shutil.rmtree(path)


@pytest.fixture
def job(tmp_path):
  job = Run(tmp_path)
  yield job
  job.checkpointer.close()


@pytest.fixture
def meanwhile(monkeypatch):
  """meanwhile(*actions): the n-th happens when arrays are read, once."""

  def inject(*actions, before='read_arrays'):
    rest, original = list(actions), getattr(reader, before)

    def read(*args, **kwargs):
      if rest:
        rest.pop(0)()
      return original(*args, **kwargs)

    monkeypatch.setattr(reader, before, read)
    return rest

  return inject


def later(action, seconds=0.3):
  threading.Timer(seconds, action).start()


@fault(
  'the newest checkpoint is replaced between listing and reading',
  'latest and best are read from the checkpoints that are there then',
)
@pytest.mark.parametrize('step', ['latest', 'best'])
@pytest.mark.parametrize('times', [1, 3])
def test_the_newest_is_replaced(
  job, meanwhile, warnings, happened, step, times
):
  job.save(1, best=1)
  left = meanwhile(*[lambda i=i: job.save(i + 2, i + 2) for i in range(times)])
  assert job.read(step) == times + 1
  assert not left and not warnings()
  happened(f'--step={step}: step {times + 1} is read, without a warning')


@fault(
  'the best checkpoint is deleted, for a better one, while it is read',
  'the new best one is read',
)
def test_the_best_moves(job, meanwhile, warnings, happened):
  job.save(1, best=1)
  job.save(2, best=1)
  meanwhile(lambda: job.save(3, best=3))
  assert job.read('best') == 3
  assert not warnings()
  happened('step 3 is read, without a warning')


@fault(
  'a checkpoint is half deleted, or has no file left, when a reader opens it',
  'the reader waits a moment for the end, and reads another',
)
@pytest.mark.parametrize('how', ['delete_half', 'empty'])
@pytest.mark.parametrize('when', ['before', 'while'])
def test_a_deletion_in_progress(job, meanwhile, warnings, happened, how, when):
  job.save(1, best=1)
  job.save(2, best=1)

  def begin():
    later(getattr(job, how)(2))

  if when == 'before':
    begin()
  else:
    meanwhile(begin)
  assert job.read('latest') == 1
  assert not warnings()
  happened('the other checkpoint is read, without a warning')


@fault(
  '--step=1, which is deleted or set aside by a rollback while it is read',
  'exit 2: it was replaced while it was read; what there is now',
)
@pytest.mark.parametrize('how', ['deleted', 'half', 'undone'])
def test_a_named_step_is_replaced(job, meanwhile, happened, how):
  job.save(1)
  if how == 'undone':
    job.save(1, best=1)
    job.checkpointer.save(2, tree(2), {'best': [1, 0.5]}, 1, 'refused')
    job.checkpointer.wait()
    name, there = 2, [1]
    meanwhile(job.checkpointer.undo)
  else:
    name, there = 1, [2]

    def replace():
      if how == 'half':
        later(job.delete_half(1))
        shutil.copytree(job.directory / '1', job.directory / '2')
      else:
        job.save(2)

    meanwhile(replace)
  with pytest.raises(UserError) as error:
    reader.read(job.directory, str(name))
  (line,) = error.value.problems
  assert line.startswith(f'--step={name}: ')
  assert 'was replaced while it was read' in line
  assert 'damaged' not in line and 'no such' not in line
  assert f'there are {there[0]}, best and latest' in line
  happened(line.replace(str(job.directory), '...'))


@fault(
  '--step=1, which is saved again while it is read',
  'the new one is read',
)
def test_a_step_is_saved_again(job, meanwhile, happened):
  job.save(1, seed=9)
  meanwhile(lambda: job.save(1))
  assert job.read('1') == 1
  happened('the arrays are those of the new one')


@fault(
  'a reader comes while the only checkpoint is being saved again',
  'the old one is read: a trainer that starts would put it back',
)
@pytest.mark.parametrize('step', ['1', 'latest', 'best'])
def test_a_step_is_being_saved_again(job, happened, step):
  job.save(1, best=1)
  aside = reader.superseded(job.directory)
  aside.mkdir()
  (job.directory / '1').rename(aside / '1')
  (job.directory / '1.orbax-checkpoint-tmp').mkdir()  # Not whole yet.
  assert job.read(step) == 1
  happened(f'--step={step}: the old one is read')


@fault(
  'every checkpoint is replaced while it is read',
  'exit 2 after a bounded number of attempts, and no talk of damage',
)
def test_a_reader_gives_up(job, monkeypatch, happened):
  monkeypatch.setattr(reader, '_ATTEMPTS', 3)
  job.save(1)
  original, attempts = reader.read_arrays, []

  def read_arrays(directory, step, meta, wanted):
    job.save(step + 1)
    attempts.append(step)
    return original(directory, step, meta, wanted)

  monkeypatch.setattr(reader, 'read_arrays', read_arrays)
  with pytest.raises(UserError) as error:
    reader.read(job.directory, 'latest')
  assert attempts == [1, 2, 3]
  (line,) = error.value.problems
  assert line.startswith('--step=latest: ')
  assert 'replaced' in line and 'damaged' not in line
  happened(line.replace(str(job.directory), '...')[:120])


@fault(
  'a damaged checkpoint is read while others rotate',
  'it is damaged, not replaced',
)
@pytest.mark.slow
@pytest.mark.parametrize('how', ['delete_half', 'empty'])
def test_damage_is_still_damage(job, meanwhile, warnings, happened, how):
  job.save(1, best=1)
  job.save(2, best=1)
  getattr(job, how)(1)
  left = meanwhile(lambda: job.save(3, best=1), before='read_meta')
  with pytest.raises(UserError) as error:
    reader.read(job.directory, '1')
  assert not left
  (line,) = error.value.problems
  assert line.startswith('checkpoint 1 is damaged: ')
  getattr(job, how)(3)
  (job.directory / '2').mkdir()
  with pytest.raises(UserError) as error:
    reader.read(job.directory, 'latest')
  assert [p.split(':')[0] for p in error.value.problems] == [
    f'checkpoint {step} is damaged' for step in (3, 2, 1)
  ]
  happened(line.partition(': ')[0] + ', and so are 2 and 3')


@fault(
  'the workdir is deleted while a checkpoint is read',
  'exit 2: there is no checkpoint',
)
def test_everything_is_deleted(tmp_path, meanwhile, happened):
  job = Run(tmp_path / 'run')
  job.save(1)
  job.checkpointer.close()
  meanwhile(lambda: shutil.rmtree(tmp_path / 'run'))
  with pytest.raises(UserError, match='there is no checkpoint'):
    reader.read(job.directory, 'latest')
  happened('there is no checkpoint')


@fault(
  '--init_from a run in progress, whose best checkpoint is replaced',
  'training starts from the new best one',
)
def test_init_from_a_run_in_progress(job, meanwhile, tiny, happened):
  config = tiny({'init_from': str(job.directory.parent)})
  workdir_lib.write_json(job.directory.parent / 'config.json', config.to_dict())

  def save(step):
    job.checkpointer.save(
      step,
      {'state': {'params': {'w': jnp.full(3, step)}, 'model_state': {}}},
      {'best': [step, 0.5]},
      step,
    )
    job.checkpointer.wait()

  save(1)
  meanwhile(lambda: save(2))
  params, _ = experiment._initial_weights(
    config, {'w': jnp.zeros(3, int)}, {}, vocab_size=3
  )
  np.testing.assert_array_equal(params['w'], [2, 2, 2])
  happened('the weights are those of step 2')


@pytest.mark.slow
@fault(
  'evaluate, again and again, beside a run that saves at each step',
  'every one succeeds',
)
def test_evaluating_a_run_in_progress(start, run, tmp_path, happened):
  workdir = tmp_path / 'run'
  changes = {
    'num_train_steps': 100_000,
    'eval_interval': 1,
    'eval_iters': 1,
    'log_interval': 1000,
    'sample.every_steps': 0,
    'checkpoint.keep_latest': 1,
  }
  trainer = start(workdir, changes=changes)
  trainer.until(lambda: (workdir / 'checkpoints.json').exists())
  found, end = [], time.monotonic() + 10
  while time.monotonic() < end or len(found) < 4:
    step = ('best', 'latest')[len(found) % 2]
    found.append(evaluate(workdir, 'val', step)['step'])
  assert found == sorted(found) or found[1::2] == sorted(found[1::2])
  num_saved = steps_of(workdir)[-1] - found[0]
  assert num_saved > 2
  # As a command too, of which standard error has no more than it should.
  command = [sys.executable, '-m', 'nanomoe.evaluate']
  words = [f'--workdir={workdir}', '--step=latest']
  output = run(command + words)
  assert output.returncode == 0, output.stderr[-3000:]
  assert 'Traceback' not in output.stderr
  assert trainer.process.poll() is None
  happened(f'{len(found) + 1} of {len(found) + 1} while {num_saved} were saved')
