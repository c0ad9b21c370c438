"""base.py on four processes, killed ten times, against an undisturbed run."""

from collections.abc import Collection, Iterator
import json
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
# Fraction of the kills whose moment is drawn from the time of a start. The
# moments of the others are drawn from the next steps of the run, so few that
# the run cannot end before the last kill.
START_FRACTION = 0.3
NEXT_STEPS = 5
GONE_SECONDS = 60.0
_POLL_SECONDS = 0.02
VALUES = {
  'num_train_steps': 60,
  'eval_interval': 5,
  'eval_iters': 2,
  'log_interval': 1,
  'sample.every_steps': 40,
  'sample.num_tokens': 50,
  **process_parity.on_mesh({'fsdp': 2, 'expert': 2}),
}
WHOLE, END = 'undisturbed', 'end'


def measure(
  directory: pathlib.Path, done: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a name and a row for each kill, and one for the end.

  Args:
    directory: Directory of the runs.
    done: Names of rows; nothing is left to do if the last one is among them.

  Raises:
    RuntimeError: A process ended before its kill.
  """
  path = directory / 'rows.json'
  rows = json.loads(path.read_text()) if path.exists() else {}
  if END in done:
    return
  whole, killed = directory / WHOLE, directory / 'killed'
  if WHOLE not in rows:
    shutil.rmtree(directory)
    directory.mkdir()
  names = [WHOLE, *map(name_of, range(NUM_KILLS)), END]
  for index, name in enumerate(names):
    if name not in rows:
      if name == WHOLE:
        rows[name] = undisturbed(whole)
      elif name == END:
        process_group.train(killed, VALUES, NUM_PROCESSES)
        rows[name] = same_ends(killed, whole)
      else:
        rows[name] = kill(killed, index - 1, rows[WHOLE])
      path.write_text(json.dumps(rows))
    yield name, rows[name]


def undisturbed(workdir: pathlib.Path) -> dict[str, float]:
  """Trains without kills; returns the seconds of the start and of the rest.

  Args:
    workdir: Directory of the run.
  """
  with _start(workdir, WHOLE) as group:
    while not is_training(group) and group.alive():
      time.sleep(_POLL_SECONDS)
    first = time.monotonic()
    group.check()
    return {
      'start_sec': first - group.started,
      'training_sec': time.monotonic() - first,
    }


def _start(workdir: pathlib.Path, name: str) -> process_group.ProcessGroup:
  words = process_group.arguments_of(workdir, VALUES)
  outputs = workdir.with_name(f'{name}.outputs')
  return process_group.ProcessGroup(words, outputs, NUM_PROCESSES)


def kill(
  workdir: pathlib.Path, index: int, took: dict[str, float]
) -> dict[str, Any]:
  """Starts the processes and kills one of them at a random moment.

  Args:
    workdir: Directory of the run.
    index: Number of the kill, from which process and moment are drawn.
    took: Seconds of the undisturbed run.

  Raises:
    RuntimeError: A process ended before the kill.
  """
  rng = np.random.default_rng([SEED, index])
  target = int(rng.integers(NUM_PROCESSES))
  is_start = bool(rng.uniform() < START_FRACTION)
  fraction = float(rng.uniform())
  # A whole number of steps, then a part of the mean time of a step.
  steps, part = divmod(fraction * NEXT_STEPS, 1)
  delay = part * took['training_sec'] / VALUES['num_train_steps']
  first = last_step(workdir)
  with _start(workdir, name_of(index)) as group:
    due = group.started + fraction * took['start_sec'] if is_start else None
    while due is None or time.monotonic() < due:
      if len(group.alive()) < NUM_PROCESSES:
        raise RuntimeError(f'ended before {name_of(index)}:\n{group.output()}')
      is_there = last_step(workdir) >= first + steps
      if due is None and is_training(group) and is_there:
        due = time.monotonic() + delay
      time.sleep(_POLL_SECONDS)
    group.kill(target)
    killed = time.monotonic()
    phase = 'training' if is_training(group) else 'start'
    step = last_step(workdir)
    codes = group.wait(GONE_SECONDS)
    seconds = time.monotonic() - killed
  return {
    'process': target,
    'fraction': fraction,
    'sec_after_start': killed - group.started,
    'phase': phase,
    'step': step,
    'gone_sec': None if None in codes else seconds,
    'codes': codes,
  }


def name_of(index: int) -> str:
  """Returns the name of a kill, from 1."""
  return f'kill {index + 1}'


def is_training(group: process_group.ProcessGroup) -> bool:
  """Returns whether process 0 has logged a step since its start.

  Args:
    group: Processes of the run.
  """
  return '\nstep ' in group.output()


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
    if name not in (WHOLE, END):
      seconds = row['gone_sec']
      shown = 'NEVER' if seconds is None else f'{seconds:.1f}'
      lines.append(
        f'| {name} | {row["process"]} | {row["phase"]} | {row["step"]} '
        f'| {shown} |'
      )
  if end := rows.get(END):
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
