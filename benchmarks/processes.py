"""python -m benchmarks.processes [--only=PART] [--workdir=DIR] [--again]

Runs of several real processes on this machine, over loopback:

  parity    20 steps on meshes of 2 and 4 processes against one process
  restores  a checkpoint of 4 processes, resumed and read by other numbers
  time      seconds of a step of base.py on 2 processes against one process
  kills     base.py on 4 processes, killed ten times, against the same run

Writes benchmarks/results/processes.json after each row. A row in that file is
kept unless --again is given. A later call continues with the runs in --workdir.
"""

import os
import pathlib
import shutil
import tempfile
from typing import Any

from absl import flags
from absl import logging as absl_logging

from benchmarks import (
  process_kills,
  process_parity,
  process_restores,
  process_time,
  results,
)
from nanomoe.config import home
from nanomoe.run import cli

PARTS = {
  'parity': process_parity.measure,
  'restores': process_restores.measure,
  'time': process_time.measure,
  'kills': process_kills.measure,
}
TABLES = {
  'parity': process_parity.table,
  'restores': process_restores.table,
  'time': process_time.table,
  'kills': process_kills.table,
}

_FLAGS = flags.FlagValues()
_ONLY = flags.DEFINE_enum(
  'only', None, list(PARTS), 'Part to measure.', flag_values=_FLAGS
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Directory of the runs, which is kept. Default: a temporary directory.',
  flag_values=_FLAGS,
)
_AGAIN = flags.DEFINE_bool(
  'again', False, 'Measures existing rows again.', flag_values=_FLAGS
)


def measure(part: str, directory: pathlib.Path) -> None:
  """Measures a part and writes its rows, one after another.

  Args:
    part: Key of `PARTS`.
    directory: Directory of the runs.
  """
  figures = results.read('processes') or {}
  figures.pop('machine', None)
  rows: dict[str, Any] = figures.get(part, {})
  if _AGAIN.value:
    rows = {}
    shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir(parents=True, exist_ok=True)
  for name, row in PARTS[part](directory, rows.keys()):
    print(part, name, row, flush=True)
    rows[name] = row
    machine = results.machine()
    figures = {**figures, part: rows, f'{part}_machine': machine}
    results.write('processes', figures)


def table(part: str) -> str:
  """Returns the Markdown table of a part.

  Args:
    part: Key of `TABLES`.
  """
  figures = results.read('processes') or {}
  if part not in figures:
    return ''
  machine = results.describe(figures[f'{part}_machine'])
  return f'{TABLES[part](figures[part])}\n\n{machine}'


def main(_: None) -> int:
  absl_logging.set_verbosity('warning')  # Orbax logs each file.
  with tempfile.TemporaryDirectory() as temporary:
    directory = pathlib.Path(
      home.expand(_WORKDIR.value, '--workdir') if _WORKDIR.value else temporary
    ).absolute()
    # Plug-ins that these runs import are not remembered for the user.
    os.environ['XDG_STATE_HOME'] = str(directory / 'state')
    for part in [_ONLY.value] if _ONLY.value else PARTS:
      measure(part, directory / part)
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__ or ''))
