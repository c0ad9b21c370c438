"""Processes that start a run together."""

import shutil
import socket
import subprocess
import time

import pytest

from tests.processes import alive, case, same_end

pytestmark = pytest.mark.slow

SOON = '--start_timeout=4'


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
    case(
      'another seed on process 1', 'seed', ['--config.seed=1'], '', often=True
    ),
    case(
      'another precision on process 1',
      'precision',
      ['--config.precision=float32'],
      '',
    ),
    case(
      'another mesh on process 1', 'mesh.data', ['--config.mesh.data=1'], ''
    ),
    case(
      'another --allow_changed on process 1',
      'allow_changed',
      ['--allow_changed=seed'],
      '',
    ),
    case(
      'another version of NumPy on process 1',
      'versions',
      [],
      'start 1 change_version',
    ),
    case(
      'another --num_processes on process 1',
      'num_processes',
      ['--num_processes=3'],
      '',
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
    case(
      'another text on process 1', 'a longer text\n' * 400, 'sha256', 'sha256'
    ),
    case('an empty text on process 1', '', 'text.txt', 'process 1'),
    case('no text on process 1', None, 'data.path', 'process 1'),
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


@pytest.mark.fault(
  injected='all of the above', promised='no process of a run is left behind'
)
def test_none_is_left(happened):
  assert alive() == []
  happened('none', 0.0)
