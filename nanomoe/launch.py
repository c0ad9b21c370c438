"""Command that trains in several processes of this machine."""

from collections.abc import Sequence
import os
import socket
import sys

from absl import flags

from nanomoe import main as train
from nanomoe.run import cli, shares, supervisor, terminal
from trainers.errors import UserError

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
nanomoe launch --num_processes=4 -- --config=configs/base.py

Trains in several processes of this machine, which share the mesh of the run.
The options after -- are those of nanomoe train. A signal reaches all processes,
and the first failure ends all.
"""

_FLAGS = flags.FlagValues()
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes',
  None,
  'Number of processes.',
  lower_bound=1,
  required=True,
  flag_values=_FLAGS,
)


def _parse(argv: list[str]) -> list[str]:
  """Returns the options of the train command, whose mistakes are reported."""
  at = argv.index('--') if '--' in argv else len(argv)
  cli.parse_flags(argv[:at], _FLAGS, _USAGE)
  words = argv[at + 1 :]
  overrides = train._parse([argv[0], *words])
  given = [f'--{flag.name}' for flag in train._CLUSTER[:3] if flag.present]
  if given:
    raise UserError(f'{", ".join(given)}: nanomoe launch sets it; omit it')
  train.requested_config(overrides)
  return words


def main(words: list[str]) -> int:
  """Trains; returns the exit code."""
  if isinstance(sys.stdout, terminal.Output):
    sys.stdout.is_log = True
  return supervisor.run_all(commands(_NUM_PROCESSES.value, words))


def commands(num_processes: int, words: list[str]) -> list[supervisor.Command]:
  """Returns the command of each process.

  Args:
    num_processes: Number of processes.
    words: Options of the train command.
  """
  base = [sys.executable, '-m', 'nanomoe.main']
  base.append(f'--num_processes={num_processes}')
  if num_processes == 1:
    return [supervisor.Command([*base, *words])]
  base.append(f'--coordinator=127.0.0.1:{_free_port()}')
  cores, gpus = shares.cores(), shares.gpus(os.environ)
  return [
    supervisor.Command(
      [*base, f'--process_id={index}', *words],
      _environ(shares.share(gpus, index, num_processes)),
      shares.share(cores, index, num_processes),
    )
    for index in range(num_processes)
  ]


def _environ(gpus: Sequence[int]) -> dict[str, str]:
  return {'JAX_LOCAL_DEVICE_IDS': ','.join(map(str, gpus))} if gpus else {}


def _free_port() -> int:
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


if __name__ == '__main__':
  cli.run(main, _parse)
