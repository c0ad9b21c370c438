"""Processes that start, print and end together, with stand-ins for training."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.process_group import free_port
from nanomoe import launch
from nanomoe.run import shares
from tests.shrunk import ROOT

# The words of this process are Python texts, one for each child.
LAUNCHER = """
import signal
import sys
# The tests may run under nohup, where SIGHUP is ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from nanomoe.run import supervisor
supervisor.GRACE_SECONDS = 1.0
words = [[sys.executable, '-u', '-c', text] for text in sys.argv[1:]]
sys.exit(supervisor.run_all([supervisor.Command(w) for w in words]))
"""
# Prints the signals that come, and ends at the first with code 75.
WAITS = """
import os, signal, time
def end(number, frame):
  print(signal.Signals(number).name)
  time.sleep(0.3)
  os._exit(75)
for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'):
  signal.signal(getattr(signal, name), end)
print('ready', os.getpid())
time.sleep(60)
"""
# Prints the signals that come, and ends at none.
STAYS = WAITS.replace('  os._exit(75)', '').replace(
  'time.sleep(60)', '[time.sleep(0.1) for _ in range(600)]'
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Connects to the others, and sums the numbers of all processes.
CONNECTS = """
import os, sys
from nanomoe.run import cli, cluster, terminal
def main(words):
  terminal.log_to_terminal()
  coordinator, size, rank = words[1], int(words[2]), int(words[3])
  cluster.connect(cluster.resolve(coordinator, size, rank, {}), 30)
  import jax
  from jax.experimental import multihost_utils
  print(sum(multihost_utils.process_allgather(jax.process_index())))
  return 0
cli.run(main, lambda words: words)
"""


def _start(*texts: str, **kwargs) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', LAUNCHER, *texts],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


@contextlib.contextmanager
def _ready(*texts: str, **kwargs):
  """Yields a launcher and the ids of its children, once all are ready."""
  with _start(*texts, **kwargs) as process:
    try:
      assert process.stdout
      lines = [process.stdout.readline() for _ in texts]
      children = [int(line.split()[-1]) for line in lines]
      yield process, children
      process.communicate(timeout=20)
    finally:
      process.kill()
    assert not _alive(children)


def _alive(ids: list[int]) -> list[int]:
  """Returns the processes that run still, after a moment."""
  end = time.monotonic() + 5
  while time.monotonic() < end:
    ids = [i for i in ids if _runs(i)]
    if not ids:
      break
    time.sleep(0.02)
  return ids


def _runs(process_id: int) -> bool:
  try:
    os.kill(process_id, 0)
    stat = pathlib.Path(f'/proc/{process_id}/stat')
    return not stat.exists() or ') Z' not in stat.read_text()
  except (ProcessLookupError, FileNotFoundError):
    return False


@pytest.mark.slow
def test_lines_are_whole_and_behind_their_process():
  text = (
    'import sys\n'
    'for i in range(500): print(i, "x" * 300)\n'
    'sys.stderr.write("no newline"); sys.stdout.write("the last")\n'
  )
  process = _start(text, text, text)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0
  for i in range(3):
    own = [line for line in out.splitlines() if line.startswith(f'[{i}] ')]
    expected = [f'[{i}] {n} {"x" * 300}' for n in range(500)]
    assert own == [*expected, f'[{i}] the last']
  assert len(out.splitlines()) == 3 * 501
  assert sorted(err.splitlines()) == [f'[{i}] no newline' for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('failure', 'code', 'named'),
  [
    ('import sys; sys.exit(3)', 3, 'exit code 3'),
    ('import os; os.kill(os.getpid(), 9)', 137, 'SIGKILL'),
  ],
)
def test_the_first_failure_ends_all(failure, code, named):
  started = time.monotonic()
  process = _start(STAYS, WAITS, f'import time; time.sleep(1); {failure}')
  out, err = process.communicate(timeout=30)
  assert process.returncode == code
  assert f'process 2 ended by {named}' in err
  assert '[1] SIGTERM' in out
  assert '[0] SIGTERM' in out  # It stays, and is killed.
  assert time.monotonic() - started < 10
  assert not _alive([int(i) for i in out.split() if i.isdigit()])


@pytest.mark.slow
@pytest.mark.parametrize('number', SIGNALS)
def test_a_signal_reaches_every_process_once(number):
  with _ready(WAITS, WAITS, WAITS) as (process, _):
    process.send_signal(number)
    if number == signal.SIGHUP:  # As a login shell does.
      time.sleep(0.1)
      process.send_signal(number)
    out, err = process.communicate(timeout=20)
  assert process.returncode == 75
  assert sorted(out.splitlines()) == [f'[{i}] {number.name}' for i in range(3)]
  assert not err


@pytest.mark.slow
def test_a_second_signal_is_passed_on_and_kills():
  with _ready(STAYS, STAYS) as (process, _):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
  assert process.returncode == 128 + signal.SIGKILL
  for i in range(2):
    own = [line for line in out.splitlines() if line.startswith(f'[{i}]')]
    assert own == [f'[{i}] SIGTERM', f'[{i}] SIGINT']


@pytest.mark.slow
def test_ctrl_c_of_a_terminal_reaches_every_process_once():
  master, slave = os.openpty()
  control = 'import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n'
  words = [sys.executable, '-c', control + LAUNCHER, WAITS, WAITS]
  with subprocess.Popen(
    words,
    cwd=ROOT,
    stdin=slave,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    assert process.stdout
    for _ in range(2):
      assert 'ready' in process.stdout.readline()
    os.write(master, b'\x03')
    out, _ = process.communicate(timeout=20)
  os.close(master)
  os.close(slave)
  assert process.returncode == 75
  assert sorted(out.splitlines()) == ['[0] SIGINT', '[1] SIGINT']


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='Linux ends the children')
def test_no_child_survives_a_killed_launcher():
  with _ready(STAYS, STAYS) as (process, children):
    process.kill()
    assert not _alive(children)


@pytest.mark.slow
def test_a_mistake_is_one_line_and_starts_nothing(run):
  words = [sys.executable, '-m', 'nanomoe', 'launch', '--num_processes=3', '--']
  config = '--config=configs/base.py'
  for given, named in [
    ([config, '--config.batch_siz=8'], 'batch_size'),
    ([config, '--process_id=1'], '--process_id'),
    ([], '--config'),
  ]:
    process = run([*words, *given])
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert named in line
    assert not process.stdout


@pytest.mark.parametrize(
  ('whole', 'index', 'num_shares', 'own'),
  [
    ([0, 1, 2, 3], 1, 2, [2, 3]),
    ([3, 5, 7], 1, 2, [5]),
    ([0, 1], 2, 4, []),
    ([], 0, 2, []),
  ],
)
def test_cores_and_devices_are_shared(whole, index, num_shares, own):
  assert shares.share(whole, index, num_shares) == own


def test_processes_differ_in_their_number_cores_and_devices(monkeypatch):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6,7')
  monkeypatch.setattr(shares, 'cores', lambda: [0, 1, 2, 3, 4])
  first, second = launch.commands(2, ['--config=x'])
  assert {*first.words} ^ {*second.words} == {
    '--process_id=0',
    '--process_id=1',
  }
  assert '--num_processes=2' in first.words
  assert first.words[-1] == '--config=x'
  assert (first.cores, second.cores) == ([0, 1], [2, 3])
  assert second.environ == {'JAX_LOCAL_DEVICE_IDS': '2,3'}
  (alone,) = launch.commands(1, [])
  assert not [word for word in alone.words if 'coordinator' in word]


@pytest.mark.slow
def test_a_child_has_its_cores_and_variables():
  text = 'import os; print(sorted(os.sched_getaffinity(0)), os.environ["A"])'
  core = min(os.sched_getaffinity(0))
  script = (
    'import sys; from nanomoe.run.supervisor import Command, run_all\n'
    f'run_all([Command([sys.executable, "-c", {text!r}], {{"A": "b"}}, '
    f'[{core}])])'
  )
  done = subprocess.run(
    [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == f'[0] [{core}] b\n'


def _finish(processes):
  """Returns (exit code, output, errors) of each process, and the seconds."""
  started = time.monotonic()
  done = [(*p.communicate(timeout=60), p.returncode) for p in processes]
  return [(c, o, e) for o, e, c in done], time.monotonic() - started


def _connect(ids, size, port, environ=None, text=CONNECTS):
  return [
    subprocess.Popen(
      [sys.executable, '-c', text, f'127.0.0.1:{port}', str(size), str(i)],
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, **(environ or {})},
    )
    for i in ids
  ]


@pytest.mark.slow
def test_processes_connect_and_print_nothing_else():
  """A proxy of the web, behind which gRPC would look, does not matter."""
  environ = {'http_proxy': 'http://127.0.0.1:9'}
  done, _ = _finish(_connect([0, 1, 2], 3, free_port(), environ))
  assert done == [(0, '3\n', '')] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
  ('ids', 'timeout', 'named'),
  [
    ([0, 2], 10, 'process 1 of 3'),
    ([1, 2], 4, 'process 0'),
    ([0, 1, 1], 60, 'twice'),
  ],
)
def test_a_failed_start_is_one_line_of_each_process(
  command, ids, timeout, named
):
  port = free_port()
  flags = [f'--coordinator=127.0.0.1:{port}', '--num_processes=3']
  processes = [
    subprocess.Popen(
      command(*flags, f'--process_id={i}', f'--start_timeout={timeout}'),
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in ids
  ]
  done, seconds = _finish(processes)
  for code, _, err in done:
    assert code == 2
    (line,) = err.splitlines()
    assert named in line
  assert seconds < timeout + 20


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_waiting_ends_all_as_interrupted(number):
  text = 'from nanomoe.run import roll_call\n'
  text += 'roll_call._FIRST_REPORT_SECONDS = 0.5\n' + CONNECTS
  processes = _connect([0, 1], 3, free_port(), text=text)
  assert processes[0].stdout
  lines = iter(processes[0].stdout.readline, '')
  # Process 1 has arrived.
  assert any('waiting for process 2 of 3' in line for line in lines)
  processes[1].send_signal(number)
  done, _ = _finish(processes)
  assert [code for code, _, _ in done] == [75, 75]
  assert 'process 1' in done[0][2]
