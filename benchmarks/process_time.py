"""Seconds of a step of base.py on two processes against one process."""

from collections.abc import Collection, Iterator
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import peers, process_group
from benchmarks.step_time import seconds

BLOCKS, STEPS = 8, 4
# Processes, devices of each, changes of base.py, and whether they are joined.
SIDES: dict[str, tuple[int, int, dict[str, str], bool]] = {
  '1 process, 2 devices': (1, 2, {'mesh.data': '2'}, False),
  '2 processes': (2, 1, {'mesh.data': '2'}, True),
  # They compute what the two processes compute, and exchange nothing.
  '2 processes, not joined': (2, 1, {'batch_size': '16'}, False),
}


class Workers:
  """Processes that time steps together when asked, and are idle otherwise.

  Args:
    size: Number of processes.
    num_devices: Number of devices of each process.
    changes: Values of config keys.
    is_joined: Whether the processes train one model.
  """

  def __init__(
    self,
    size: int,
    num_devices: int,
    changes: dict[str, str],
    is_joined: bool,
  ):
    address = f'127.0.0.1:{process_group.free_port()}'
    self._processes = []
    for index in range(size):
      place = [address, size, index] if is_joined else None
      words = [json.dumps(place), json.dumps(changes)]
      self._processes.append(
        subprocess.Popen(
          [sys.executable, '-m', 'benchmarks.workers.joined', *words],
          cwd=process_group.ROOT,
          env=process_group.environment(num_devices),
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          text=True,
        )
      )

  def ask(self, what: str, n: int = 1) -> list[Any]:
    """Returns the answer of each process, which work at the same time.

    Args:
      what: 'step', or 'collectives'.
      n: Number of steps.
    """
    for process in self._processes:
      print(what, n, file=process.stdin, flush=True)
    return [json.loads(p.stdout.readline()) for p in self._processes]

  def __call__(self, n: int) -> list[float]:
    """Returns the seconds of n steps, as means over the processes.

    Args:
      n: Number of steps.
    """
    taken = self.ask('step', n)
    return [statistics.mean(step) for step in zip(*taken, strict=True)]

  def close(self) -> None:
    """Kills the processes."""
    # The others would report the end of the first process.
    for process in reversed(self._processes):
      process.kill()
    for process in self._processes:
      process.wait()


def measure(
  directory: pathlib.Path, done: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a name and a row for each side, which were timed in turn.

  Args:
    directory: Directory of the runs, which is not used.
    done: Names of rows; nothing is timed if it has all sides.
  """
  del directory
  if set(done) >= SIDES.keys():
    return
  sides: dict[str, Workers] = {}
  try:
    for name, arguments in SIDES.items():
      sides[name] = Workers(*arguments)
      sides[name](1)  # One after another: compilation needs memory.
    moved = {name: side.ask('collectives')[0] for name, side in sides.items()}
    timed = peers.interleave(dict(sides), blocks=BLOCKS, n=STEPS)
  finally:
    for side in sides.values():
      side.close()
  for name, row in timed.items():
    yield name, {**row, 'collectives': moved[name]}


def table(rows: dict[str, Any]) -> str:
  """Returns Markdown: a row for each side, and the share of communication.

  Args:
    rows: Rows by name.
  """
  one, two, apart = (rows[name] for name in SIDES)
  lines = [
    '| run | s per step: median (quartiles) | relative | collectives of a step '
    '| MB of collectives |',
    '|---|---:|---:|---:|---:|',
  ]
  for name in SIDES:
    row = rows[name]
    moved = row['collectives'].values()
    lines.append(
      f'| {name} | {seconds(row)} '
      f'| {row["median_sec"] / one["median_sec"]:.2f} '
      f'| {sum(entry["count"] for entry in moved)} '
      f'| {sum(entry["bytes"] for entry in moved) / 1e6:.1f} |'
    )
  share = 1 - apart['median_sec'] / two['median_sec']
  lines += [
    '',
    f'Share of communication in a step of two processes: {100 * share:.0f} %.',
  ]
  return '\n'.join(lines)
