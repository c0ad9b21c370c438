"""Checkpoints that several processes write and read together."""

import json
import pathlib
import shutil

import pytest

from tests.processes import LAST, alive, case, ends_like, same_end, steps_of
from tests.runs import result_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
  ('fault', 'at', 'left'),
  [
    case('the disk of process 0 is full after a save', 'manifest 1 20', 0, [4]),
    case('the disk of process 0 is full in the last', 'copy 2 20', 0, [4]),
    case('the disk of process 1 is full', 'copy 1 4', 1, [], often=True),
    case('the disk of process 1 is full in the last save', 'copy 2 4', 1, [4]),
  ],
)
@pytest.mark.fault(
  promised='the save fails on all: exit 4; resumed, bitwise the same'
)
def test_a_full_disk(launch, tmp_path, undisturbed, happened, fault, at, left):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone()
  assert gone.codes == [4, 4], job.outputs()
  assert 'Traceback' not in job.outputs()
  assert steps_of(workdir) == left
  assert result_of(workdir)['status'] == 'unsaved'
  # Of each step that was not saved, and of two attempts more for the last one.
  attempts = (LAST - max(left, default=0)) // 4 + 2
  lines = (workdir / 'log.txt').read_text().splitlines()
  told = sum('could not be saved' in line for line in lines)
  assert told == attempts, lines
  others = workdir / 'log.1.txt'
  assert not others.exists() or 'could not be' not in others.read_text()
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}, checkpoints {left} are left; equal', gone.seconds)


@pytest.mark.parametrize(
  'at',
  [
    case('a save cannot start on process 0, once', 0),
    case('a save cannot start on process 1, once', 1),
  ],
)
@pytest.mark.fault(promised='it fails on all, in one line; the next succeeds')
def test_a_save_fails_once(launch, tmp_path, undisturbed, happened, at):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault='copy 2 fail', at=at)
  gone = job.gone()
  assert gone.codes == [0, 0], job.outputs()
  told = [x for x in job.outputs().splitlines() if 'could not be saved' in x]
  assert len(told) == 1, told
  assert steps_of(workdir) == [4, LAST]
  same_end(workdir, undisturbed())
  happened(f'{gone}, checkpoints [4, {LAST}]; equal', gone.seconds)


def parts(workdir: pathlib.Path, step: int, process: int) -> list[pathlib.Path]:
  """The files of arrays that a process wrote, or all, the largest first."""
  folder = workdir / 'checkpoints' / str(step) / 'arrays'
  folder = folder / f'ocdbt.process_{process}' / 'd'
  return sorted(folder.iterdir(), key=lambda path: -path.stat().st_size)


def flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  for place in range(len(data) // 4, len(data), 97):
    data[place] ^= 16
  path.write_bytes(data)


@pytest.mark.parametrize(
  ('mesh', 'process', 'damage'),
  [
    case('the newest checkpoint is damaged', {'data': 2}, 0, flip),
    case(
      'the newest checkpoint is damaged, in the part of process 1',
      *({'fsdp': 2, 'data': 1}, 1, flip),
      often=True,
    ),
    case(
      'the newest checkpoint lacks the part of process 1',
      *({'fsdp': 2, 'data': 1}, 1, pathlib.Path.unlink),
    ),
  ],
)
@pytest.mark.fault(promised='all use the older one; bitwise the same end')
def test_a_damaged_checkpoint(
  launch, tmp_path, undisturbed, happened, mesh, process, damage
):
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed(**mesh), workdir)
  damage(parts(workdir, LAST, process)[0])
  job = launch(workdir, mesh=mesh).start_all()
  gone = job.gone()
  assert gone.codes == [0, 0], job.outputs()
  assert 'Traceback' not in job.outputs()
  assert (workdir / 'damaged_checkpoints' / str(LAST)).exists()
  same_end(workdir, undisturbed(**mesh))
  happened(f'{gone}; equal', gone.seconds)


@pytest.mark.full
@pytest.mark.fault(
  injected='all checkpoints are damaged, in the part of process 1',
  promised='exit 2 everywhere, and the checkpoints stay',
)
def test_damaged_checkpoints(launch, tmp_path, undisturbed, happened):
  workdir, mesh = tmp_path / 'run', {'fsdp': 2, 'data': 1}
  shutil.copytree(undisturbed(**mesh), workdir)
  for step in (4, LAST):
    flip(parts(workdir, step, 1)[0])
  job = launch(workdir, mesh=mesh).start_all()
  gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  assert 'Traceback' not in job.outputs()
  assert f'checkpoint {LAST}' in job.output(0)
  assert steps_of(workdir) == [4, LAST]
  result = json.loads((workdir / 'result.json').read_text())
  assert result['status'] == 'done'  # Of the start before.
  happened(str(gone), gone.seconds)


@pytest.mark.fault(
  injected='all of the above', promised='no process of a run is left behind'
)
def test_none_is_left(happened):
  assert alive() == []
  happened('none', 0.0)
