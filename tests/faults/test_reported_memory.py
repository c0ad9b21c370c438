"""Memory that is free is what the limits of a process leave, not the host."""

import pathlib
import resource

import pytest
from regression import make_trainer

from trainers.runtime import host_memory, memory

pytestmark = pytest.mark.reported('cgroup')

MEGABYTE = 2**20


def write(root: pathlib.Path, files: dict[str, str]) -> None:
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(group: str, limit: str, used: int = 0, cached: int = 0) -> dict:
  """The files of a group of version 2."""
  directory = f'sys/fs/cgroup/{group}'.rstrip('/')
  return {
    f'{directory}/memory.max': f'{limit}\n',
    f'{directory}/memory.current': f'{used}\n',
    f'{directory}/memory.stat': f'anon 7\ninactive_file {cached}\n',
  }


def v1(group: str, limit: int, used: int, cached: int = 0) -> dict:
  """The files of a group of version 1."""
  directory = f'sys/fs/cgroup/memory/{group}'.rstrip('/')
  return {
    f'{directory}/memory.limit_in_bytes': f'{limit}\n',
    f'{directory}/memory.usage_in_bytes': f'{used}\n',
    f'{directory}/memory.stat': f'cache 9\ntotal_inactive_file {cached}\n',
  }


HOST = {'proc/meminfo': 'MemTotal: 9000 kB\nMemAvailable:    8000 kB\n'}
HOST_FREE = 8000 * 1024
OF_V2 = {'proc/self/cgroup': '0::/job/step\n'}
OF_V1 = {'proc/self/cgroup': '9:pids:/job\n4:memory:/job/step\n0::/\n'}
UNLIMITED = 9223372036854771712


@pytest.mark.fault(
  promised='the free memory is the least that any limit leaves'
)
@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    pytest.param(
      OF_V2 | v2('job/step', '5000', 3000, 1000),
      3000,
      marks=pytest.mark.fault(injected='a memory.max of the own group (v2)'),
    ),
    pytest.param(
      OF_V2 | v2('job/step', 'max') | v2('job', '5000', 4000),
      1000,
      marks=pytest.mark.fault(injected='a memory.max of the group above (v2)'),
    ),
    pytest.param(
      OF_V2 | v2('job/step', '2000', 100) | v2('job', '5000', 4000),
      1000,
      marks=pytest.mark.fault(injected='nested limits, the outer one tighter'),
    ),
    pytest.param(
      {'proc/self/cgroup': '0::/\n'} | v2('', '5000', 1000),
      4000,
      marks=pytest.mark.fault(injected='a container that sees its own group'),
    ),
    pytest.param(
      {'proc/self/cgroup': '0::/../../x\n'} | v2('', '5000', 1000),
      4000,
      marks=pytest.mark.fault(injected='a path outside of the namespace'),
    ),
    pytest.param(
      OF_V2 | v2('job/step', 'max', 3000),
      HOST_FREE,
      marks=pytest.mark.fault(injected="a memory.max of 'max'"),
    ),
    pytest.param(
      OF_V2 | v2('job/step', '3000', 5000),
      0,
      marks=pytest.mark.fault(injected='a group above its limit'),
    ),
    pytest.param(
      OF_V1 | v1('job/step', 5000, 3000, 1000) | v1('', UNLIMITED, 9),
      3000,
      marks=pytest.mark.fault(injected='memory.limit_in_bytes (v1)'),
    ),
    pytest.param(
      OF_V1 | v1('', 5000, 4000),
      1000,
      marks=pytest.mark.fault(
        injected="a v1 container that sees the host's path"
      ),
    ),
    pytest.param(
      OF_V1 | v1('job/step', UNLIMITED, 3000),
      HOST_FREE,
      marks=pytest.mark.fault(injected='a v1 group without a limit'),
    ),
    pytest.param(
      {'proc/self/cgroup': '4:memory:/job\n0::/job\n'}
      | v1('job', 5000, 1000)
      | {'sys/fs/cgroup/unified/job/memory.max': '6'},
      6,
      marks=pytest.mark.fault(injected='both versions at once'),
    ),
    pytest.param(
      {'proc/self/cgroup': 'nothing that is known\n\n'},
      HOST_FREE,
      marks=pytest.mark.fault(injected='a list of groups that is not one'),
    ),
    pytest.param(
      OF_V2 | v2('job/step', '\x00?', 1),
      HOST_FREE,
      marks=pytest.mark.fault(injected='a limit that is no number'),
    ),
    pytest.param(
      {},
      HOST_FREE,
      marks=pytest.mark.fault(injected='no control groups'),
    ),
  ],
)
def test_limits_of_control_groups(tmp_path, happened, files, expected):
  write(tmp_path, HOST | files)
  assert host_memory.free(tmp_path) == expected
  if expected == HOST_FREE:
    happened('what the host has')
  else:
    happened(f'{expected} bytes')


@pytest.mark.fault(
  injected='a limit that cannot be read, or a directory in its place',
  promised='the free memory is what the other limits leave',
)
def test_a_limit_that_cannot_be_read(tmp_path, happened):
  write(tmp_path, HOST | OF_V2 | v2('job', '5000', 1000))
  (tmp_path / 'sys/fs/cgroup/job/step/memory.max').mkdir(parents=True)
  assert host_memory.free(tmp_path) == 4000
  (tmp_path / 'sys/fs/cgroup/job/memory.current').unlink()
  assert host_memory.free(tmp_path) == 5000
  happened('the group above counted, as did a limit without its use')


@pytest.mark.fault(
  injected='ulimit -v and ulimit -d',
  promised='the free memory is what they leave',
)
@pytest.mark.parametrize(
  ('name', 'used'), [('RLIMIT_AS', 'VmSize'), ('RLIMIT_DATA', 'VmData')]
)
def test_limits_of_the_process(tmp_path, monkeypatch, happened, name, used):
  write(tmp_path, HOST | {'proc/self/status': f'{used}:\t    1024 kB\n'})
  number, unlimited = getattr(resource, name), resource.RLIM_INFINITY
  monkeypatch.setattr(
    resource,
    'getrlimit',
    lambda n: (3 * MEGABYTE if n == number else unlimited, unlimited),
  )
  assert host_memory.free(tmp_path) == 2 * MEGABYTE
  happened('the limit less what is used')


@pytest.mark.fault(
  injected='a system without /proc',
  promised='nothing is known, and nothing is claimed',
)
def test_nothing_is_known(tmp_path, happened):
  assert host_memory.free(tmp_path) is None
  happened('no warning')


@pytest.mark.fault(
  injected='a group whose limit is too small for a step',
  promised='a warning before the first step, with what is free',
)
def test_a_step_that_a_limit_forbids(tmp_path, monkeypatch, warnings, happened):
  write(tmp_path, HOST | OF_V2 | v2('job/step', '1000', 990))
  free = host_memory.free
  monkeypatch.setattr(host_memory, 'free', lambda: free(tmp_path))
  assert make_trainer(memory_hint=lambda _: 'so').fit() == 'done'
  (line,) = warnings()
  assert memory._gb(10) in line
  happened('the warning names 0.00 GB')
