"""Losses, expert loads and samples of several processes against one."""

from collections.abc import Collection, Iterator
import pathlib
from typing import Any

import numpy as np

from benchmarks import parity, process_group, results

NUM_STEPS = 20
SMALL = {
  **parity.SMALL,
  'num_train_steps': NUM_STEPS,
  'eval_interval': 10,
  'eval_iters': 2,
  'log_interval': 1,
  'sample.every_steps': 10,
  'sample.num_tokens': 40,
}
MESHES: dict[str, dict[str, int]] = {
  'data 2': {'data': 2},
  'data 4': {'data': 4},
  'fsdp 2 x expert 2': {'fsdp': 2, 'expert': 2},
  'tensor 2 x data 2': {'tensor': 2, 'data': 2},
}
# Process and device counts by the size of a mesh; the first is one process.
LAYOUTS = {2: [(1, 2), (2, 1)], 4: [(1, 4), (2, 2), (4, 1)]}


def write_text(path: pathlib.Path) -> pathlib.Path:
  """Writes 5,000 random characters, 12 of them distinct; returns the path."""
  rng = np.random.default_rng(0)
  path.write_text(''.join(rng.choice(list('abcdefghij \n'), 5000)))
  return path


def on_mesh(sizes: dict[str, int]) -> dict[str, int]:
  """Returns the config keys of a mesh."""
  return {f'mesh.{axis}': size for axis, size in sizes.items()}


def measure(
  directory: pathlib.Path, done: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a name and a row for each mesh and number of processes.

  Args:
    directory: Directory of the runs.
    done: Names of the rows that are left out.
  """
  values = {**SMALL, 'data.path': write_text(directory / 'text.txt')}
  one = directory / 'one device'
  for mesh, sizes in MESHES.items():
    size = int(np.prod(list(sizes.values())))
    single = directory / f'{mesh}, 1 x {size}'
    for num_processes, num_devices in LAYOUTS[size]:
      name = f'{mesh}, {num_processes} x {num_devices}'
      if name in done:
        continue
      for workdir, changes, layout in (
        (one, {}, (1, 1)),
        (single, on_mesh(sizes), (1, size)),
        (directory / name, on_mesh(sizes), (num_processes, num_devices)),
      ):
        if not (workdir / 'result.json').exists():
          process_group.train(workdir, {**values, **changes}, *layout)
      yield (
        name,
        {
          'mesh': mesh,
          'processes': num_processes,
          'devices': num_devices,
          'to_one_device': differences(directory / name, one),
          'to_one_process': differences(directory / name, single),
        },
      )


def differences(workdir: pathlib.Path, other: pathlib.Path) -> dict[str, Any]:
  """Returns the largest differences of two runs.

  Losses and gradient norms are compared relatively; loads as fractions of the
  assignments.

  Args:
    workdir: Directory of a run.
    other: Directory of the other run.

  Raises:
    RuntimeError: The runs logged other metrics, or saved other steps.
  """
  lines, others = results.metrics(workdir), results.metrics(other)
  keys = [(line['step'], *line) for line in lines]
  saved = [(d / 'checkpoints.json').read_text() for d in (workdir, other)]
  if keys != [(line['step'], *line) for line in others] or len(set(saved)) > 1:
    raise RuntimeError(f'{workdir} and {other} have other metrics or steps')

  def largest(key: str, relative: bool) -> float:
    pairs = [
      (np.array(a[key]), np.array(b[key]))
      for a, b in zip(lines, others, strict=True)
      if key in a
    ]
    return max(
      float(np.max(np.abs(a - b) / (np.abs(b) if relative else 1)))
      for a, b in pairs
    )

  samples = [(d / 'sample.txt').read_text() for d in (workdir, other)]
  return {
    'train_loss': largest('train/loss', relative=True),
    'val_loss': largest('val/cross_entropy', relative=True),
    # AdamW hides a wrong scale of the gradients from the losses.
    'gradient_norm': largest('gradient_norm', relative=True),
    'load': max(
      largest(f'{split}/expert_load', relative=False)
      for split in ('train', 'val')
    ),
    'same_sample': samples[0] == samples[1] and len(samples[0]) > 0,
  }


def table(rows: dict[str, Any]) -> str:
  """Returns Markdown: a row for each mesh and number of processes.

  Args:
    rows: Rows by name.
  """
  lines = [
    '| mesh | processes x devices | train loss | val loss | gradient norm '
    '| expert loads | sample | train loss, to one process with this mesh |',
    '|---|---|---:|---:|---:|---:|---|---:|',
  ]
  for row in rows.values():
    found = row['to_one_device']
    sample = 'equal' if found['same_sample'] else 'DIFFERENT'
    lines.append(
      f'| {row["mesh"]} | {row["processes"]} x {row["devices"]} '
      f'| {found["train_loss"]:.1e} | {found["val_loss"]:.1e} '
      f'| {found["gradient_norm"]:.1e} | {found["load"]:.0e} | {sample} '
      f'| {row["to_one_process"]["train_loss"]:.1e} |'
    )
  return '\n'.join(lines)
