"""Launchers that start the processes of a run, by the variables they set."""

from collections.abc import Callable, Mapping
import logging
import re
from typing import NamedTuple
import zlib

from trainers.errors import UserError

log = logging.getLogger(__name__)

_KUBERNETES_PORT = 55527
# The last 4096 ports; JAX derives a port from the number of a job likewise.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


class Cluster(NamedTuple):
  """Place of a process among the processes of its run.

  Attributes:
    coordinator: HOST:PORT at which process 0 serves the others.
    num_processes: Number of processes.
    process_id: Number of this process, from 0.
    source: Where the values come from: 'flags', 'JAX_* variables', 'Open MPI',
      'SLURM' or 'Kubernetes'.
    local_device: Index of the one accelerator of its machine that this process
      uses; None stands for all.
  """

  coordinator: str
  num_processes: int
  process_id: int
  source: str
  local_device: int | None = None

  def __str__(self) -> str:
    return (
      f'process {self.process_id} of {self.num_processes}, '
      f'coordinator {self.coordinator} ({self.source})'
    )


def detect(environ: Mapping[str, str]) -> Cluster | None:
  """Returns the cluster of the first launcher whose variables are all set."""
  for name, launcher in LAUNCHERS.items():
    missing = [v for v in launcher.variables if not environ.get(v)]
    if not missing:
      return launcher.read(environ)._replace(source=name)
    if len(missing) < len(launcher.variables):
      log.info('one process, not those of %s: %s not set', name, _are(missing))
  return None


def _are(names: list[str]) -> str:
  return f'{", ".join(names)} {"are" if len(names) > 1 else "is"}'


def _number(environ: Mapping[str, str], name: str) -> int:
  if not re.fullmatch('[0-9]+', environ[name]):
    raise UserError(f'{name}={environ[name]!r}: it must be a whole number')
  return int(environ[name])


def _derived_port(environ: Mapping[str, str], job: str) -> int:
  """Returns a port that all processes of a job derive from its name."""
  return _port(environ, _FIRST_PORT + zlib.crc32(job.encode()) % _NUM_PORTS)


def _port(environ: Mapping[str, str], default: int) -> int:
  name = 'JAX_COORDINATOR_PORT'
  return _number(environ, name) if environ.get(name) else default


def _read_jax(environ: Mapping[str, str]) -> Cluster:
  return Cluster(
    environ['JAX_COORDINATOR_ADDRESS'],
    _number(environ, 'JAX_NUM_PROCESSES'),
    _number(environ, 'JAX_PROCESS_ID'),
    '',
  )


def _read_open_mpi(environ: Mapping[str, str]) -> Cluster:
  """Reads the variables of mpirun, which must run on the machine of process 0.

  Raises:
    UserError: The processes are on several machines, and no variable names the
      machine of mpirun.
  """
  job = environ['PMIX_NAMESPACE']
  size = _number(environ, 'OMPI_COMM_WORLD_SIZE')
  local_size = _number(environ, 'OMPI_COMM_WORLD_LOCAL_SIZE')
  # Open MPI 4: '1531576320.0;tcp://10.0.0.1,10.1.0.1:34911;tcp6://[fe80::2]:1'.
  uri = environ.get('OMPI_MCA_orte_hnp_uri', '')
  if local_size == size:
    host = '127.0.0.1'
  elif found := re.search(r'tcp://([^,:]+)|tcp6://\[([^,\]]+)', uri):
    host = found[1] or f'[{found[2]}]'
  elif found := re.fullmatch(r'prterun-(.+)-\d+@\d+', job):  # Open MPI 5.
    host = found[1]
  else:
    raise UserError(
      f'Open MPI: PMIX_NAMESPACE={job!r} does not name the machine of process '
      '0; give --coordinator, --num_processes and --process_id'
    )
  rank = _number(environ, 'OMPI_COMM_WORLD_RANK')
  device = _own_device(environ, local_size, 'OMPI_COMM_WORLD_LOCAL_RANK')
  return Cluster(
    f'{host}:{_derived_port(environ, job)}', size, rank, '', device
  )


def _read_slurm(environ: Mapping[str, str]) -> Cluster:
  """Reads the variables of a step, which srun starts.

  The variables of the job are those of its batch script too.
  """
  job = f'{environ["SLURM_JOB_ID"]}.{environ["SLURM_STEP_ID"]}'
  host = first_host(environ['SLURM_STEP_NODELIST'])
  # Such as '4(x2),3': 4 tasks on each of two machines, 3 on another.
  counts = re.findall(
    r'(\d+)(?:\(x\d+\))?', environ['SLURM_STEP_TASKS_PER_NODE']
  )
  per_node = max(map(int, counts), default=1)
  return Cluster(
    f'{host}:{_derived_port(environ, job)}',
    _number(environ, 'SLURM_STEP_NUM_TASKS'),
    _number(environ, 'SLURM_PROCID'),
    '',
    _own_device(environ, per_node, 'SLURM_LOCALID'),
  )


def first_host(nodes: str) -> str:
  """Returns the first host of a node list of SLURM, 'a[007-9,12]-b' for one.

  Each bracket stands for its first number.
  """
  first = re.split(r',(?![^\[]*\])', nodes)[0]
  return re.sub(r'\[(\w+)[^\]]*\]', r'\1', first)


def _read_kubernetes(environ: Mapping[str, str]) -> Cluster:
  """Reads the variables that deploy/jobset.yaml sets.

  The pods of a JobSet have the names <JobSet>-<job>-<index>-<pod>, below the
  name of the JobSet.
  """
  jobset = environ['JOBSET_NAME']
  job = environ['REPLICATED_JOB_NAME']
  return Cluster(
    f'{jobset}-{job}-0-0.{jobset}:{_port(environ, _KUBERNETES_PORT)}',
    _number(environ, 'NUM_PROCESSES'),
    _number(environ, 'JOB_COMPLETION_INDEX'),
    '',
  )


def _own_device(
  environ: Mapping[str, str], num_local: int, rank: str
) -> int | None:
  """Returns the accelerator of one process among several on a machine.

  It is None where a process is alone, or where the launcher shows each process
  its own accelerator.
  """
  visible = environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
  is_shown_one = len(visible) == 1 and visible != ['']
  return None if num_local < 2 or is_shown_one else _number(environ, rank)


class Launcher(NamedTuple):
  """A program that starts the processes of a run.

  Attributes:
    variables: Environment variables that must all be set.
    read: Returns the cluster of these variables, without its source.
  """

  variables: tuple[str, ...]
  read: Callable[[Mapping[str, str]], Cluster]


# In the order of detection: mpirun starts its processes by srun inside a job of
# SLURM, whose variables they inherit.
LAUNCHERS: dict[str, Launcher] = {
  'JAX_* variables': Launcher(
    ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'),
    _read_jax,
  ),
  'Open MPI': Launcher(
    (
      'OMPI_COMM_WORLD_SIZE',
      'OMPI_COMM_WORLD_RANK',
      'OMPI_COMM_WORLD_LOCAL_SIZE',
      'OMPI_COMM_WORLD_LOCAL_RANK',
      'PMIX_NAMESPACE',
    ),
    _read_open_mpi,
  ),
  'SLURM': Launcher(
    (
      'SLURM_JOB_ID',
      'SLURM_STEP_ID',
      'SLURM_STEP_NODELIST',
      'SLURM_STEP_NUM_TASKS',
      'SLURM_STEP_TASKS_PER_NODE',
      'SLURM_PROCID',
      'SLURM_LOCALID',
    ),
    _read_slurm,
  ),
  'Kubernetes': Launcher(
    (
      'JOBSET_NAME',
      'REPLICATED_JOB_NAME',
      'NUM_PROCESSES',
      'JOB_COMPLETION_INDEX',
    ),
    _read_kubernetes,
  ),
}
