"""Which processes make up a run, and that they find each other."""

import contextlib
import json
import socket
import threading
import time

import pytest

from benchmarks.process_group import free_port
from nanomoe.run import launchers, roll_call
from nanomoe.run.cluster import resolve
from nanomoe.run.launchers import LAUNCHERS
from nanomoe.run.roll_call import Hello
from trainers.errors import UserError

# What each launcher sets, and the cluster of it.
OPEN_MPI_4 = {
  'OMPI_COMM_WORLD_SIZE': '4',
  'OMPI_COMM_WORLD_RANK': '3',
  'OMPI_COMM_WORLD_LOCAL_SIZE': '2',
  'OMPI_COMM_WORLD_LOCAL_RANK': '1',
  'OMPI_MCA_orte_hnp_uri': '2009137152.0;tcp://10.0.0.7,10.1.0.7:549',
  'PMIX_NAMESPACE': '2009137153',
}
OPEN_MPI_5 = {
  **{k: v for k, v in OPEN_MPI_4.items() if 'hnp' not in k},
  'PMIX_NAMESPACE': 'prterun-node-a1-7382@1',
}
SLURM = {
  'SLURM_JOB_ID': '1234',
  'SLURM_STEP_ID': '0',
  'SLURM_STEP_NODELIST': 'node[07-9,12]-ib,other',
  'SLURM_STEP_NUM_TASKS': '5',
  'SLURM_STEP_TASKS_PER_NODE': '1(x5)',
  'SLURM_PROCID': '4',
  'SLURM_LOCALID': '0',
}
# In a batch script and in a shell of salloc, outside srun.
SLURM_JOB = {
  'SLURM_JOB_ID': '1234',
  'SLURM_JOB_NODELIST': 'node[07-9]',
  'SLURM_NTASKS': '5',
  'SLURM_PROCID': '0',
  'SLURM_LOCALID': '0',
}
KUBERNETES = {
  'KUBERNETES_SERVICE_HOST': '10.96.0.1',
  'JOBSET_NAME': 'moe',
  'REPLICATED_JOB_NAME': 'workers',
  'NUM_PROCESSES': '4',
  'JOB_COMPLETION_INDEX': '2',
}
JAX = {
  'JAX_COORDINATOR_ADDRESS': 'a:1',
  'JAX_NUM_PROCESSES': '2',
  'JAX_PROCESS_ID': '1',
}
COMPLETE = {
  'JAX_* variables': JAX,
  'Open MPI': OPEN_MPI_5,
  'SLURM': SLURM,
  'Kubernetes': KUBERNETES,
}


def _resolve(environ=None, *, at=None, n=None, i=None):
  return resolve(at, n, i, environ or {})


@pytest.mark.parametrize(
  ('environ', 'host', 'size', 'rank', 'source', 'device'),
  [
    (JAX, 'a', 2, 1, 'JAX_* variables', None),
    (OPEN_MPI_4, '10.0.0.7', 4, 3, 'Open MPI', 1),
    (OPEN_MPI_5, 'node-a1', 4, 3, 'Open MPI', 1),
    (
      {**OPEN_MPI_5, 'OMPI_COMM_WORLD_LOCAL_SIZE': '4', 'PMIX_NAMESPACE': 'x'},
      *('127.0.0.1', 4, 3, 'Open MPI', 1),
    ),
    (
      {**OPEN_MPI_4, 'OMPI_MCA_orte_hnp_uri': '1.0;tcp6://[fe80::1,fe80::2]:5'},
      *('[fe80::1]', 4, 3, 'Open MPI', 1),
    ),
    ({**OPEN_MPI_4, **SLURM}, '10.0.0.7', 4, 3, 'Open MPI', 1),
    (SLURM, 'node07-ib', 5, 4, 'SLURM', None),
    (
      {**SLURM, 'SLURM_STEP_TASKS_PER_NODE': '2(x2),1', 'SLURM_LOCALID': '1'},
      *('node07-ib', 5, 4, 'SLURM', 1),
    ),
    (
      {
        **SLURM,
        'SLURM_STEP_TASKS_PER_NODE': '5',
        'CUDA_VISIBLE_DEVICES': '3',
      },
      *('node07-ib', 5, 4, 'SLURM', None),
    ),
    (KUBERNETES, 'moe-workers-0-0.moe', 4, 2, 'Kubernetes', None),
  ],
)
def test_a_complete_environment_is_a_cluster(
  environ, host, size, rank, source, device
):
  found = _resolve(environ)
  assert found
  assert found[1:] == (size, rank, source, device)
  name, _, port = found.coordinator.rpartition(':')
  assert name == host
  assert 1 <= int(port) <= 65535


@pytest.mark.parametrize(
  ('name', 'missing'),
  [(name, v) for name, row in LAUNCHERS.items() for v in row.variables],
)
@pytest.mark.parametrize('value', [None, ''])
def test_an_incomplete_environment_is_one_process(name, missing, value, caplog):
  environ = {**COMPLETE[name], missing: value or ''}
  if value is None:
    del environ[missing]
  with caplog.at_level('INFO', 'nanomoe'):
    assert _resolve(environ) is None
  assert missing in caplog.text


@pytest.mark.parametrize(
  'environ',
  [
    {},
    SLURM_JOB,
    {**SLURM, 'SLURM_STEP_NUM_TASKS': '1', 'SLURM_PROCID': '0'},
    {**SLURM_JOB, 'JAX_COORDINATOR_ADDRESS': 'a:1'},
    {'KUBERNETES_SERVICE_HOST': '10.96.0.1', 'JOB_COMPLETION_INDEX': '3'},
  ],
)
def test_one_process_is_no_cluster(environ):
  assert _resolve(environ) is None


@pytest.mark.parametrize('environ', COMPLETE.values())
def test_one_process_disables_detection_and_flags_win(environ):
  assert _resolve(environ) is not None
  assert _resolve(environ, n=1) is None
  found = _resolve(environ, at='b:2', n=7, i=6)
  assert found == ('b:2', 7, 6, 'flags', None)


@pytest.mark.parametrize(
  ('flags', 'named'),
  [
    ({'at': 'a:1'}, ['--num_processes', '--process_id']),
    ({'n': 2}, ['--coordinator', '--process_id']),
    ({'i': 0}, ['--coordinator', '--num_processes']),
    ({'at': 'a:1', 'n': 2}, ['--process_id']),
    ({'n': 2, 'i': 1}, ['--coordinator']),
    ({'at': 'a:1', 'n': 2, 'i': 2}, ['--process_id=2']),
    ({'n': 1, 'i': 1, 'at': 'a:1'}, ['--process_id=1']),
    ({'at': 'a', 'n': 2, 'i': 0}, ['--coordinator=a:', 'HOST:PORT']),
    ({'at': 'a:0', 'n': 2, 'i': 0}, ['--coordinator=a:0', '65535']),
    ({'at': 'a:65536', 'n': 2, 'i': 0}, ['65535']),
    ({'at': ':1', 'n': 2, 'i': 0}, ['HOST:PORT']),
    ({'at': '::1:1', 'n': 2, 'i': 0}, ['HOST:PORT']),
  ],
)
def test_a_mistake_in_flags_is_one_line(flags, named):
  with pytest.raises(UserError) as error:
    _resolve(SLURM, **flags)
  (line,) = error.value.problems
  for name in named:
    assert name in line


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({**SLURM, 'SLURM_PROCID': 'x'}, 'SLURM_PROCID'),
    ({**SLURM, 'SLURM_PROCID': '5'}, 'SLURM'),
    ({**SLURM, 'JAX_COORDINATOR_PORT': '70000'}, '70000'),
    ({**JAX, 'JAX_COORDINATOR_ADDRESS': 'a'}, 'JAX'),
    ({**OPEN_MPI_5, 'PMIX_NAMESPACE': 'x'}, 'PMIX_NAMESPACE'),
  ],
)
def test_a_bad_variable_is_one_line(changes, named):
  with pytest.raises(UserError, match=named):
    _resolve(changes)


def test_jobs_have_ports_of_their_own():
  ports = {
    _resolve({**SLURM, 'SLURM_JOB_ID': str(job), 'SLURM_STEP_ID': str(step)})
    for job in (1, 2)
    for step in (0, 1)
  }
  assert len(ports) == 4
  chosen = _resolve({**SLURM, 'JAX_COORDINATOR_PORT': '77'})
  assert chosen
  assert chosen.coordinator.endswith(':77')


@pytest.mark.parametrize(
  ('nodes', 'first'),
  [
    ('node001', 'node001'),
    ('a,b', 'a'),
    ('n[001-0015],b', 'n001'),
    ('n[1,3]-gpu,b', 'n1-gpu'),
    ('rack[0-1]node[2-3]', 'rack0node2'),
  ],
)
def test_the_first_host_of_a_node_list(nodes, first):
  assert launchers.first_host(nodes) == first


def _call(hellos, timeout=5.0, port=None, strangers=()):
  """Returns what each process raises, or None; each is a thread."""
  address = ('127.0.0.1', port or free_port())
  raised: list = [None] * len(hellos)

  def arrive(index, hello):
    try:
      roll_call.wait_for_all(hello, address, timeout=timeout, label='here')
    except (UserError, KeyboardInterrupt) as error:
      raised[index] = error

  threads = [
    threading.Thread(target=arrive, args=pair) for pair in enumerate(hellos)
  ]
  for thread in threads:
    thread.start()
  for words in strangers:
    _say(address, words)
  for thread in threads:
    thread.join()
  return raised


def _say(address, words: bytes):
  """Connects as soon as somebody listens, and sends words."""
  for _ in range(100):
    with (
      contextlib.suppress(ConnectionRefusedError),
      socket.create_connection(address) as connection,
    ):
      connection.sendall(words)
      return
    time.sleep(0.02)


def test_all_arrive():
  assert _call([Hello(i, 4) for i in (2, 0, 3, 1)]) == [None] * 4


def test_a_stranger_is_ignored():
  words = (b'GET / HTTP/1.1\r\n', b'[1]\n', b'["a", 2]\n', b'"x"\n', b'')
  hellos = [Hello(0, 2), Hello(1, 2)]
  assert _call(hellos, strangers=words) == [None, None]


@pytest.mark.parametrize(
  ('hellos', 'named'),
  [
    pytest.param(
      [(0, 4), (2, 4)], 'processes 1, 3 of 4', marks=pytest.mark.slow
    ),
    ([(0, 2)], 'process 1 of 2'),
    ([(1, 3), (2, 3)], 'process 0'),
    ([(0, 3), (1, 3), (1, 3)], 'process 1 was started twice'),
    ([(0, 3), (1, 2)], 'process 1 was started with --num_processes=2'),
    pytest.param([(0, 20)], 'and 11 more of 20', marks=pytest.mark.slow),
  ],
)
def test_all_report_the_same_mistake(monkeypatch, hellos, named):
  monkeypatch.setattr(roll_call, '_LATE_SECONDS', 0.3)
  for error in _call([Hello(*hello) for hello in hellos], timeout=1.0):
    assert isinstance(error, UserError)
    assert named in str(error)


@pytest.mark.slow
def test_a_late_process_hears_of_the_mistake():
  port = free_port()
  early = threading.Thread(
    target=_call, args=([Hello(0, 3), Hello(1, 2)],), kwargs={'port': port}
  )
  early.start()
  time.sleep(0.5)
  (error,) = _call([Hello(2, 3)], port=port, timeout=1.0)
  early.join()
  assert 'process 1' in str(error)


def test_a_signal_to_one_process_reaches_all(monkeypatch):
  monkeypatch.setattr(roll_call, '_LATE_SECONDS', 0.3)
  goodbye = json.dumps((1, 3)) + '\n' + '"SIGTERM"\n'
  port = free_port()

  def leave():
    time.sleep(0.2)
    with socket.create_connection(('127.0.0.1', port)) as connection:
      for line in goodbye.splitlines(keepends=True):
        connection.sendall(line.encode())
        time.sleep(0.2)

  thread = threading.Thread(target=leave)
  thread.start()
  (error,) = _call([Hello(0, 3)], port=port)
  thread.join()
  assert isinstance(error, KeyboardInterrupt)
  assert 'process 1' in str(error)


def test_a_port_in_use_is_named():
  with socket.create_server(('127.0.0.1', 0)) as other:
    port = other.getsockname()[1]
    (error,) = _call([Hello(0, 2)], port=port)
  assert str(port) in str(error)


def test_an_unknown_host_is_named():
  with pytest.raises(UserError, match=r'unknown|Temporary'):
    roll_call.wait_for_all(
      Hello(1, 2), ('no-such-host.invalid', 1), timeout=1.0, label='here'
    )
