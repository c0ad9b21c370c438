"""Processes that start a run together, and the files that they share."""

import json
import pathlib
import shutil
import socket
import subprocess
import time

import pytest

from tests.processes import LAST, alive, ends_like, same_end, steps_of
from tests.runs import result_of

pytestmark = pytest.mark.slow

SOON = '--start_timeout=4'
# The start of two processes, beside the time that they wait.
SECONDS = 60


def case(what, *arguments, often=False):
  """A row of the table; without `often`, CI leaves it to the benchmark."""
  marks = [pytest.mark.fault(injected=what)]
  marks += [] if often else [pytest.mark.full]
  return pytest.param(*arguments, marks=marks)


def one_line(job, name, word):
  """The process ended with one line, which has `word`, and no stack."""
  lines = job.output(name).splitlines()
  assert 'Traceback' not in job.output(name), job.outputs()
  assert sum(x.startswith('error: ') for x in lines) == 1, job.outputs()
  assert any(x.startswith('error: ') and word in x for x in lines), lines


@pytest.mark.parametrize(
  'late',
  [
    case('process 0 starts 3 s after process 1', 0),
    case('process 1 starts 3 s after process 0', 1),
  ],
)
@pytest.mark.fault(promised='the other waits; exit 0, equal')
def test_late(launch, tmp_path, undisturbed, happened, late):
  workdir = tmp_path / 'run'
  job = launch(workdir).start(1 - late)
  time.sleep(3)
  gone = job.start(late).gone()
  assert gone.codes == [0, 0], job.outputs()
  same_end(workdir, undisturbed())
  happened(f'{gone}; equal', gone.seconds)


@pytest.mark.parametrize(
  'never',
  [
    case('process 0 never starts', 0),
    case('process 1 never starts', 1, often=True),
  ],
)
@pytest.mark.fault(promised=f'exit 2 after {SOON}; its number is named')
def test_never(launch, tmp_path, happened, never):
  workdir = tmp_path / 'run'
  job = launch(workdir, words=[SOON]).start(1 - never)
  gone = job.gone()
  assert gone.codes == [2], job.outputs()
  one_line(job, 1 - never, f'process {never}')
  assert not workdir.exists()
  happened(f'{gone}; process {never} is named', gone.seconds)


@pytest.mark.full
@pytest.mark.fault(
  injected='process 1 of 3 starts twice',
  promised='exit 2 everywhere; its number is named',
)
def test_twice(launch, tmp_path, happened):
  workdir = tmp_path / 'run'
  job = launch(workdir, size=3)
  gone = job.start(0).start(1).start(1, name='again').gone()
  assert gone.codes == [2, 2, 2], job.outputs()
  for name in (0, 1, 'again'):
    one_line(job, name, 'process 1')
  assert not workdir.exists()
  happened(f'{gone}; process 1 is named', gone.seconds)


@pytest.mark.parametrize(
  'extra',
  [
    case('process 0 starts again during the run', 0),
    case('process 1 starts again during the run', 1),
  ],
)
@pytest.mark.fault(promised='it exits with 2, and the run is not disturbed')
def test_again_during_the_run(launch, tmp_path, undisturbed, happened, extra):
  workdir = tmp_path / 'run'
  job = launch(workdir, words=[SOON]).start_all(fault='step 3 wait')
  job.until(job.note(0).exists)
  job.start(extra, name='again')
  assert job.processes['again'].wait(100) == 2, job.outputs()
  one_line(job, 'again', str(job.port))
  job.proceed(0)
  gone = job.gone()
  assert gone.codes == [0, 0, 2], job.outputs()
  same_end(workdir, undisturbed())
  happened(f'{gone}; equal', gone.seconds)


@pytest.mark.parametrize(
  ('key', 'words', 'fault'),
  [
    case('another seed', 'seed', ['--config.seed=1'], '', often=True),
    case('another precision', 'precision', ['--config.precision=float32'], ''),
    case('another mesh', 'mesh.data', ['--config.mesh.data=1'], ''),
    case(
      'another --allow_changed', 'allow_changed', ['--allow_changed=seed'], ''
    ),
    case('another NumPy', 'versions', [], 'start 1 change_version'),
    case(
      'another number of processes', 'num_processes', ['--num_processes=3'], ''
    ),
  ],
)
@pytest.mark.fault(promised='exit 2 everywhere: the process, and what differs')
def test_another(launch, tmp_path, happened, key, words, fault):
  workdir = tmp_path / 'run'
  job = launch(workdir).start(0).start(1, *words, fault=fault)
  gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  for name in (0, 1):
    one_line(job, name, key)
    one_line(job, name, 'process 1')
  assert not workdir.exists()
  happened(f'{gone}; {key} and process 1 are named', gone.seconds)


@pytest.mark.parametrize(
  ('text', 'word', 'word_of_0'),
  [
    case('another text', 'a longer text\n' * 400, 'sha256', 'sha256'),
    case('an empty text', '', 'text.txt', 'process 1'),
    case('no text', None, 'data.path', 'process 1'),
  ],
)
@pytest.mark.fault(promised='exit 2 everywhere: the process, and the file')
def test_another_text(
  launch, tmp_path, corpus, happened, text, word, word_of_0
):
  places = [tmp_path / 'place0', tmp_path / 'place1']
  for place, content in zip(places, [corpus.read_text(), text], strict=True):
    place.mkdir()
    if content is not None:
      (place / 'text.txt').write_text(content)
  workdir = tmp_path / 'run'
  job = launch(workdir, text='text.txt', words=[SOON])
  for i, place in enumerate(places):
    job.start(i, cwd=place)
  gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  for name, expected in enumerate([word_of_0, word]):
    assert 'Traceback' not in job.output(name)
    assert expected in job.output(name), job.outputs()
  assert not workdir.exists()
  happened(str(gone), gone.seconds)


@pytest.mark.parametrize(
  'answer',
  [
    case('another program has the port, and never answers', None),
    case('another program has the port, and answers', b'HTTP/1.1 400\r\n'),
  ],
)
@pytest.mark.fault(promised='exit 2 everywhere, in a line with the port')
def test_a_port_in_use(launch, tmp_path, happened, answer):
  workdir = tmp_path / 'run'
  with socket.create_server(('127.0.0.1', 0)) as program:
    port = program.getsockname()[1]
    job = launch(workdir, words=['--start_timeout=1'], port=port).start_all()
    if answer:
      connection, _ = program.accept()
      with connection:
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1000)
    gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  for name in (0, 1):
    one_line(job, name, str(port))
  assert not workdir.exists()
  happened(f'{gone}; the port is named', gone.seconds)


@pytest.mark.full
@pytest.mark.fault(
  injected='a relative --workdir, and processes in two directories',
  promised='exit 2 everywhere, in a line with the process; no workdir is left',
)
def test_a_workdir_of_process_0(launch, tmp_path, happened):
  places = [tmp_path / 'place0', tmp_path / 'place1']
  job = launch('run')
  for i, place in enumerate(places):
    place.mkdir()
    job.start(i, cwd=place)
  gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  for name in (0, 1):
    one_line(job, name, 'process 1')
  assert [list(place.iterdir()) for place in places] == [[], []]
  happened(f'{gone}; process 1 is named', gone.seconds)


@pytest.mark.parametrize(
  'is_new',
  [
    case('a new --workdir on a disk of process 0 alone', True, often=True),
    case('the --workdir of a run, on a disk of process 0 alone', False),
  ],
)
@pytest.mark.fault(promised='exit 2 everywhere, in a line with the process')
def test_a_disk_of_process_0(launch, tmp_path, undisturbed, happened, is_new):
  disk = tmp_path / 'disk'
  disk.mkdir()
  if not is_new:
    shutil.copytree(undisturbed(), disk / 'run')
  mount = 'mount -t tmpfs none "$0" && exec "$@"'
  prefix = ['unshare', '-rm', 'sh', '-c', mount, str(disk)]
  if subprocess.run([*prefix, 'true'], capture_output=True).returncode:
    pytest.skip('no file system can be made here')
  job = launch(disk / 'run').start(0).start(1, prefix=prefix)
  gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  for name in (0, 1):
    one_line(job, name, 'process 1')
  left = [] if is_new else ['run']
  assert [path.name for path in disk.iterdir()] == left
  happened(f'{gone}; process 1 is named', gone.seconds)


@pytest.mark.full
@pytest.mark.fault(
  injected='another --workdir on process 1',
  promised='exit 2 everywhere, in a line with the process; no workdir is left',
)
def test_another_workdir(launch, tmp_path, happened):
  workdir, other = tmp_path / 'run', tmp_path / 'other'
  job = launch(workdir).start(0).start(1, f'--workdir={other}')
  gone = job.gone()
  assert gone.codes == [2, 2], job.outputs()
  for name in (0, 1):
    one_line(job, name, 'process 1')
  assert not workdir.exists()
  assert not other.exists()
  happened(f'{gone}; process 1 is named', gone.seconds)


@pytest.mark.full
@pytest.mark.fault(
  injected='a second run of two processes in the same workdir',
  promised='exit 2 everywhere; the first run is not disturbed',
)
def test_a_second_run(launch, tmp_path, undisturbed, happened):
  workdir = tmp_path / 'run'
  first = launch(workdir).start_all(fault='step 3 wait')
  first.until(first.note(0).exists)
  second = launch(workdir).start_all()
  gone = second.gone()
  assert gone.codes == [2, 2], second.outputs()
  for name in (0, 1):
    one_line(second, name, '--workdir')
  first.proceed(0)
  assert first.gone().codes == [0, 0], first.outputs()
  same_end(workdir, undisturbed())
  happened(f'{gone}; the first: exit 0, equal', gone.seconds)


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
  # Of each step that was not saved, and of another attempt for the last one.
  attempts = (LAST - max(left, default=0)) // 4 + 1
  lines = (workdir / 'log.txt').read_text().splitlines()
  told = sum('could not be saved' in line for line in lines)
  assert told == attempts, lines
  others = workdir / 'log.1.txt'
  assert not others.exists() or 'could not be' not in others.read_text()
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}, checkpoints {left} are left; equal', gone.seconds)


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
