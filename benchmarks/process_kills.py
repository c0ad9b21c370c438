"""base.py on four processes, killed ten times, against an undisturbed run."""

from collections.abc import Collection, Iterator
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from benchmarks import process_group, process_parity, results
from trainers.checkpoint import reader

SEED = 0
NUM_KILLS = 10
NUM_PROCESSES = 4
# Range of the seconds from a start to its kill; a start takes a third of it.
SPAN_SECONDS = 60.0
GONE_SECONDS = 60.0
VALUES = {
  'num_train_steps': 300,
  'eval_interval': 10,
  'eval_iters': 2,
  'log_interval': 1,
  'sample.every_steps': 50,
  'sample.num_tokens': 50,
  **process_parity.on_mesh({'fsdp': 2, 'expert': 2}),
}


def measure(
  directory: pathlib.Path, done: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a name and a row for each kill, and one for the end.

  Args:
    directory: Directory of the runs.
    done: Names of the rows that are left out, if their run still exists.

  Raises:
    RuntimeError: The run ended before its last kill.
  """
  if 'end' in done:
    return
  whole, killed = directory / 'whole', directory / 'killed'
  if not (whole / 'result.json').exists():
    process_group.train(whole, VALUES, NUM_PROCESSES)
  if not done:
    shutil.rmtree(killed, ignore_errors=True)
  for index in range(NUM_KILLS):
    name = name_of(index)
    if name not in done or not killed.exists():
      yield name, kill(killed, index)
  started = time.monotonic()
  process_group.train(killed, VALUES, NUM_PROCESSES)
  seconds = time.monotonic() - started
  yield 'end', {'seconds': seconds, **same_ends(killed, whole)}


def kill(workdir: pathlib.Path, index: int) -> dict[str, Any]:
  """Starts the processes and kills one of them at a random moment.

  Args:
    workdir: Directory of the run.
    index: Number of the kill, from which process and moment are drawn.

  Raises:
    RuntimeError: The run ended before the kill.
  """
  rng = np.random.default_rng([SEED, index])
  target = int(rng.integers(NUM_PROCESSES))
  delay = float(rng.uniform(0, SPAN_SECONDS))
  words = process_group.arguments_of(workdir, VALUES)
  outputs = workdir.with_name(f'{name_of(index)}.outputs')
  with process_group.ProcessGroup(words, outputs, NUM_PROCESSES) as group:
    while time.monotonic() < group.started + delay:
      if len(group.alive()) < NUM_PROCESSES:
        raise RuntimeError(f'ended before {name_of(index)}:\n{group.output()}')
      time.sleep(0.02)
    group.kill(target)
    begin = time.monotonic()
    is_training = 'step ' in group.output()
    step = last_step(workdir)
    codes = group.wait(GONE_SECONDS)
    seconds = time.monotonic() - begin
  return {
    'process': target,
    'delay': delay,
    'phase': 'training' if is_training else 'start',
    'step': step,
    'gone_sec': None if None in codes else seconds,
    'codes': codes,
  }


def name_of(index: int) -> str:
  """Returns the name of a kill, from 1."""
  return f'kill {index + 1}'


def last_step(workdir: pathlib.Path) -> int:
  """Returns the last step in metrics.jsonl, 0 without one.

  Args:
    workdir: Directory of a run in progress.
  """
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return int(lines[-1].split(',')[0].split(':')[1]) if lines else 0


def same_ends(
  workdir: pathlib.Path, other: pathlib.Path
) -> dict[str, bool | int]:
  """Returns whether two runs left equal arrays, metrics and samples.

  Args:
    workdir: Directory of a finished run.
    other: Directory of the other run.
  """
  directories = [d / 'checkpoints' for d in (workdir, other)]
  steps = [reader.steps_in(d) for d in directories]
  contents = [
    reader.read_meta(d, found[-1])['content']
    for d, found in zip(directories, steps, strict=True)
  ]
  logged = [
    [{k: v for k, v in line.items() if 'sec' not in k} for line in lines]
    for lines in map(results.metrics, (workdir, other))
  ]
  samples = [(d / 'sample.txt').read_text() for d in (workdir, other)]
  return {
    'step': steps[0][-1],
    'num_arrays': len(contents[0]),
    'num_lines': len(logged[0]),
    'same_steps': steps[0] == steps[1],
    'same_arrays': contents[0] == contents[1],
    'same_metrics': logged[0] == logged[1],
    'same_sample': samples[0] == samples[1],
  }


def table(rows: dict[str, Any]) -> str:
  """Returns Markdown: a row for each kill, and the outcome.

  Args:
    rows: Rows by name.
  """
  lines = [
    '| | process | phase | last step in metrics.jsonl '
    '| s until the others were gone |',
    '|---|---:|---|---:|---:|',
  ]
  for name, row in rows.items():
    if name != 'end':
      seconds = row['gone_sec']
      shown = 'NEVER' if seconds is None else f'{seconds:.1f}'
      lines.append(
        f'| {name} | {row["process"]} | {row["phase"]} | {row["step"]} '
        f'| {shown} |'
      )
  if end := rows.get('end'):
    parts = ('arrays', 'metrics', 'sample')
    shown = ', '.join(
      f'{part} {"equal" if end[f"same_{part}"] else "DIFFERENT"}'
      for part in parts
    )
    lines += [
      '',
      f'After step {end["step"]}, against the undisturbed run: {shown} '
      f'({end["num_arrays"]} arrays, {end["num_lines"]} lines of metrics).',
    ]
  return '\n'.join(lines)
