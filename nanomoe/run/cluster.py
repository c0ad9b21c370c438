"""Processes of a run: the place of this one among them, and the connection."""

from collections.abc import Mapping
import os
import re
import sys
from typing import NamedTuple

from absl import flags

from nanomoe.run import backend, cli, roll_call, terminal
from nanomoe.run.launchers import Cluster, detect
from trainers.errors import UserError, first_line

_HEARTBEAT_SECONDS = 10
_SHUTDOWN_SECONDS = 10


class Flags(NamedTuple):
  """Holders of the flags of `define_flags`."""

  coordinator: flags.FlagHolder
  num_processes: flags.FlagHolder
  process_id: flags.FlagHolder
  start_timeout: flags.FlagHolder
  hang_timeout: flags.FlagHolder

  def resolve(self) -> Cluster | None:
    """Returns `resolve` of the flags and the environment."""
    values = (holder.value for holder in self[:3])
    return resolve(*values, environ=os.environ)


def define_flags(values: flags.FlagValues) -> Flags:
  """Defines the flags of a command that several processes run together."""
  return Flags(
    flags.DEFINE_string(
      'coordinator',
      None,
      'HOST:PORT of process 0, equal for all processes of a run. Default: as '
      'SLURM, Open MPI or Kubernetes say.',
      flag_values=values,
    ),
    flags.DEFINE_integer(
      'num_processes',
      None,
      'Number of processes of the run. 1 disables the detection of SLURM, Open '
      'MPI and Kubernetes.',
      lower_bound=1,
      flag_values=values,
    ),
    flags.DEFINE_integer(
      'process_id',
      None,
      'Number of this process, from 0.',
      lower_bound=0,
      flag_values=values,
    ),
    flags.DEFINE_integer(
      'start_timeout',
      300,
      'Seconds within which all processes of a run must arrive.',
      lower_bound=1,
      flag_values=values,
    ),
    flags.DEFINE_integer(
      'hang_timeout',
      600,
      'Seconds without progress after which a process of several ends; 0 '
      'disables it.',
      lower_bound=0,
      flag_values=values,
    ),
  )


def resolve(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  environ: Mapping[str, str],
) -> Cluster | None:
  """Returns the place of this process among others, or None if it is alone.

  Flags take precedence. Otherwise the launcher is detected whose variables are
  all set. A shell of `salloc` or a batch script has only some of them.

  Args:
    coordinator: Value of --coordinator, None if it is not given.
    num_processes: Value of --num_processes; 1 disables the detection.
    process_id: Value of --process_id.
    environ: Environment variables.

  Raises:
    UserError: The flags are incomplete, or a value is out of its range.
  """
  given = {
    '--coordinator': coordinator,
    '--num_processes': num_processes,
    '--process_id': process_id,
  }
  missing = [name for name, value in given.items() if value is None]
  if num_processes == 1 and not process_id:
    return None
  if len(missing) == len(given):
    cluster = detect(environ)
  elif missing:
    shown = [f'{k}={v}' for k, v in given.items() if v is not None]
    raise UserError(
      f'{" ".join(shown)}: {" and ".join(missing)} must be given too'
    )
  else:
    cluster = Cluster(*given.values(), source='flags')  # pyright: ignore
  if cluster is None:
    return None
  _check(cluster)
  return cluster if cluster.num_processes > 1 else None


def connect(cluster: Cluster, start_timeout: int) -> None:
  """Waits for all processes of the run, then connects JAX.

  It is called before any other use of JAX. It ends the process with the exit
  code of a mistake if JAX itself cannot connect after all have arrived.

  Args:
    cluster: Place of this process.
    start_timeout: Seconds within which all processes must arrive.

  Raises:
    UserError: A process did not arrive or was started twice, the number of
      processes differs between them, or the coordinator's address is wrong.
    KeyboardInterrupt: A signal ended this process or another one.
  """
  backend.import_jax()  # Its mistakes are reported before the others wait.
  host, port = _address(cluster)
  roll_call.wait_for_all(
    roll_call.Hello(cluster.process_id, cluster.num_processes),
    (host, port),
    timeout=float(start_timeout),
    # Pods get their names after they were started.
    is_named_late=cluster.source == 'Kubernetes',
    label=_label(cluster),
  )
  if isinstance(sys.stdout, terminal.Output):
    sys.stdout.leave_to_python()
  # gRPC would look for the other processes behind the proxy of the web.
  os.environ['no_grpc_proxy'] = host  # noqa: SIM112 (gRPC's own name)
  import jax  # noqa: PLC0415 (it takes seconds)

  jax.config.update('jax_check_proxy_envs', False)
  # Its handler of SIGTERM would replace that of the command.
  jax.config.update('jax_enable_preemption_service', False)
  devices = cluster.local_device
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      local_device_ids=None if devices is None else [devices],
      cluster_detection_method='deactivate',
      initialization_timeout=start_timeout,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
      coordinator_bind_address=roll_call.bind_address(host, port),
    )
  except Exception as error:
    print(f'error: {_label(cluster)}: {first_line(error)}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(cli.USER_ERROR)  # JAX would wait for the others at its exit.


def _label(cluster: Cluster) -> str:
  """Returns how an error names the coordinator's address."""
  if cluster.source == 'flags':
    return f'--coordinator={cluster.coordinator}'
  return f'coordinator {cluster.coordinator} ({cluster.source})'


def _address(cluster: Cluster) -> tuple[str, int]:
  """Returns the host and the port of the coordinator.

  Raises:
    UserError: The address is not HOST:PORT.
  """
  host, _, port = cluster.coordinator.rpartition(':')
  is_ipv6 = re.fullmatch(r'\[.+\]', host)
  is_host = host and (is_ipv6 or ':' not in host)
  if is_host and re.fullmatch('[0-9]{1,5}', port) and 1 <= int(port) <= 65535:
    return host.strip('[]'), int(port)
  raise UserError(
    f'{_label(cluster)}: it must be HOST:PORT with a port from 1 to 65535'
  )


def _check(cluster: Cluster) -> None:
  """Raises UserError if a value is out of its range."""
  _address(cluster)
  prefix = '--' if cluster.source == 'flags' else f'{cluster.source}: '
  if cluster.num_processes < 1:
    raise UserError(
      f'{prefix}num_processes={cluster.num_processes}: it must be at least 1'
    )
  if not 0 <= cluster.process_id < cluster.num_processes:
    raise UserError(
      f'{prefix}process_id={cluster.process_id}: it must be from 0 to '
      f'{cluster.num_processes - 1}, because there are '
      f'{cluster.num_processes} processes'
    )
