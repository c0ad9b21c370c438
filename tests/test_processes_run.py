"""Real processes that train one model together, on this machine."""

import json
import pathlib
import shutil
import time

import pytest

from benchmarks import (
  process_group,
  process_kills,
  process_parity,
  process_restores,
  restores,
)
from benchmarks.process_group import ProcessGroup

pytestmark = pytest.mark.slow

NUM_STEPS = process_restores.NUM_STEPS
VALUES = {
  **restores.SMALL,
  'eval_interval': NUM_STEPS,
  'num_train_steps': NUM_STEPS + process_restores.NUM_MORE,
  'sample.every_steps': NUM_STEPS,
  'sample.num_tokens': 20,
  'callbacks.start.type': 'benchmarks.process_group.StartFingerprints',
}


@pytest.fixture(scope='module')
def values(tmp_path_factory):
  text = tmp_path_factory.mktemp('text') / 'text.txt'
  return {**VALUES, 'data.path': process_parity.write_text(text)}


@pytest.fixture(scope='module')
def one(values, tmp_path_factory):
  """The workdir of a run of one process."""
  workdir = tmp_path_factory.mktemp('runs') / 'one'
  process_group.train(workdir, values)
  return workdir


@pytest.fixture(scope='module')
def saved(values, one):
  """The workdir of a run of four processes, saved after its first steps.

  One process is later than the 30 s within which Gloo connects processes.
  """
  workdir = one.with_name('saved')
  changes = {
    'num_train_steps': NUM_STEPS,
    'mesh.fsdp': 2,
    'mesh.expert': 2,
    'callbacks.late.type': 'tests.late.Late',
    'callbacks.late.seconds': 33.0,
  }
  process_group.train(workdir, {**values, **changes}, 4)
  return workdir


def _evaluated(workdir: pathlib.Path) -> dict:
  words = [f'--workdir={workdir}', f'--step={NUM_STEPS}']
  outputs = workdir.with_name('evaluate')
  with ProcessGroup(words, outputs, module='nanomoe.evaluate') as group:
    group.check()
    output = group.output()
  return json.loads(output[output.index('{') :])


def _processes_of(directory: pathlib.Path) -> list[str]:
  """Returns the commands of living processes that name a directory."""
  commands = []
  for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try:
      commands.append(path.read_bytes().replace(b'\0', b' ').decode())
    except (OSError, UnicodeDecodeError):
      continue
  return [command for command in commands if str(directory) in command]


def _become(directory: pathlib.Path, count: int) -> bool:
  """Returns whether there are so many such processes within 20 seconds.

  A process that replaces its program has no command for a moment.
  """
  end = time.monotonic() + 20
  while time.monotonic() < end:
    if len(_processes_of(directory)) == count:
      return True
    time.sleep(0.05)
  return False


def test_two_processes_train_as_one(values, one):
  workdir = one.with_name('two')
  process_group.train(workdir, {**values, 'mesh.data': 2}, 2)
  found = process_parity.differences(workdir, one)
  assert found['train_loss'] < 1e-6
  assert found['val_loss'] < 1e-6
  assert found['gradient_norm'] < 1e-5
  assert found['load'] == 0
  assert found['same_sample']


def test_one_process_resumes_what_four_saved(values, one, saved):
  workdir = shutil.copytree(saved, one.with_name('resumed'))
  process_group.train(workdir, values)
  row = process_restores.resumed_row(workdir, one)
  assert row['same_fingerprints']
  assert row['difference'] < 1e-6


def test_evaluate_reads_what_four_processes_saved(one, saved):
  found, expected = _evaluated(saved), _evaluated(one)
  assert found['num_tokens'] == expected['num_tokens']
  assert found['cross_entropy'] == pytest.approx(
    expected['cross_entropy'], rel=1e-6
  )


def test_no_process_is_left(values, one, saved):
  assert _become(one.parent, 0)
  words = process_group.arguments_of(one.with_name('left'), values)
  with ProcessGroup(words, one.with_name('left.outputs'), 2) as group:
    assert _become(one.parent, 2)
  assert not group.alive()
  assert not _processes_of(one.parent)


def test_the_last_step_of_a_file_that_is_being_written(tmp_path):
  assert process_kills.last_step(tmp_path) == 0
  (tmp_path / 'metrics.jsonl').write_text('{"step": 7, "a": 1}\n{"step": 8')
  assert process_kills.last_step(tmp_path) == 7
