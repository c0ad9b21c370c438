"""A checkpoint of four processes, resumed and read by other numbers of them."""

from collections.abc import Callable, Collection, Iterator
import json
import pathlib
import shutil
from typing import Any

from benchmarks import process_group, process_parity, restores
from trainers.checkpoint import reader
from trainers.checkpoint.checkpointer import Checkpointer

NUM_STEPS, NUM_MORE = 4, 3
SIZES = {'fsdp': 2, 'expert': 2}
# Mesh, processes and devices of each.
RESUMED: dict[str, tuple[dict[str, int], int, int]] = {
  'one device': ({}, 1, 1),
  'data 2': ({'data': 2}, 2, 1),
  'tensor 2 x fsdp 2': ({'tensor': 2, 'fsdp': 2}, 1, 4),
  'fsdp 2 x expert 2': (SIZES, 4, 1),
}
_PLUG_IN = 'benchmarks.process_group.StartFingerprints'
# JSON values of a checkpoint that the saver does not make itself.
_META = (
  *('identity', 'num_rollbacks', 'next_hook', 'metrics_size', 'score', 'best'),
  'callbacks',
)


def measure(
  directory: pathlib.Path, done: Collection[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields a name and a row for each run or command that reads the checkpoint.

  Args:
    directory: Directory of the runs.
    done: Names of the rows that are left out.
  """
  text = process_parity.write_text(directory / 'text.txt')
  values = {
    **restores.SMALL,
    'eval_interval': NUM_STEPS,
    'data.path': text,
    'num_train_steps': NUM_STEPS,
    'callbacks.start.type': _PLUG_IN,
  }
  more = {**values, 'num_train_steps': NUM_STEPS + NUM_MORE}
  saved, whole = directory / 'saved', directory / 'whole'
  for workdir, changes in ((saved, values), (whole, more)):
    if not (workdir / 'result.json').exists():
      changes = {**changes, **process_parity.on_mesh(SIZES)}
      process_group.train(workdir, changes, 4)
  for mesh, (sizes, *layout) in RESUMED.items():
    name = f'resumed, {mesh}, {layout[0]} x {layout[1]}'
    if name not in done:
      workdir = _copy(saved, directory / 'resumed')
      changes = {**more, **process_parity.on_mesh(sizes)}
      process_group.train(workdir, changes, *layout)
      yield name, resumed_row(workdir, whole)
  rewritten = directory / 'rewritten'
  if not rewritten.exists():
    rewrite(saved, rewritten)
  for name, read in _readers(directory, values).items():
    if name not in done:
      yield name, {'difference': difference(read(saved), read(rewritten))}


def resumed_row(workdir: pathlib.Path, whole: pathlib.Path) -> dict[str, Any]:
  """Returns the figures of a resumed run.

  Args:
    workdir: Directory of the resumed run, which has `StartFingerprints`.
    whole: Directory of a run that was not interrupted.
  """
  meta = reader.read_meta(workdir / 'checkpoints', NUM_STEPS)
  content = {
    name: value
    for name, value in meta['content'].items()
    if name.startswith('state.')
  }
  path = workdir / process_group.FINGERPRINTS
  found = [restores.losses(d)[NUM_STEPS:] for d in (workdir, whole)]
  return {
    'same_fingerprints': json.loads(path.read_text()) == content,
    'difference': difference(*found),
  }


def difference(found: Any, expected: Any) -> float:
  """Returns the largest relative difference of numbers; texts must be equal.

  Args:
    found: Lists and dicts of numbers and texts.
    expected: Values of the same structure.

  Raises:
    RuntimeError: A text or a structure differs.
  """
  if isinstance(expected, dict) and found.keys() == expected.keys():
    pairs = [(found[key], expected[key]) for key in expected]
  elif isinstance(expected, list) and len(found) == len(expected):
    pairs = list(zip(found, expected, strict=True))
  elif found == expected:
    return 0.0
  elif isinstance(expected, int | float):
    return abs(found - expected) / abs(expected or 1)
  else:
    raise RuntimeError(f'{found!r} is not {expected!r}')
  return max((difference(*pair) for pair in pairs), default=0.0)


def rewrite(saved: pathlib.Path, target: pathlib.Path) -> None:
  """Makes a copy of a run whose checkpoint this process alone writes.

  Args:
    saved: Directory of a run.
    target: Directory of the copy.
  """
  _copy(saved, target)
  directory = target / 'checkpoints'
  arrays, meta = reader.read(directory, 'latest')
  shutil.rmtree(directory)
  kept = {name: meta[name] for name in _META if name in meta}
  saver = Checkpointer(directory, layout=reader.Layout(meta['layout']))
  saver.save(meta['step'], arrays, kept, meta['step'])
  saver.wait()
  saver.close()


def _readers(
  directory: pathlib.Path, values: dict[str, Any]
) -> dict[str, Callable[[pathlib.Path], Any]]:
  """Returns functions of a workdir that return what a command reads in it."""

  def command(module: str, workdir: pathlib.Path, *words: str) -> str:
    arguments = [f'--workdir={workdir}', '--step=latest', *words]
    outputs = directory / f'{module}.outputs'
    with process_group.ProcessGroup(
      arguments, outputs, module=f'nanomoe.{module}'
    ) as group:
      group.check()
      return group.output()

  def evaluate(workdir: pathlib.Path) -> dict[str, Any]:
    output = command('evaluate', workdir)
    found = json.loads(output[output.index('{') :])
    return {k: v for k, v in found.items() if k != 'workdir' and 'sec' not in k}

  def generate(workdir: pathlib.Path) -> str:
    return command('generate', workdir, '--num_tokens=40', '--prompt=abc')

  def init_from(source: pathlib.Path, size: int) -> list[float]:
    workdir = directory / 'started'
    shutil.rmtree(workdir, ignore_errors=True)
    changes = {**values, 'num_train_steps': NUM_MORE, 'mesh.data': size}
    words = [f'--init_from={source}']
    process_group.train(workdir, changes, size, words=words)
    return restores.losses(workdir)

  return {
    'nanomoe.evaluate': evaluate,
    'nanomoe.generate': generate,
    '--init_from, 1 process': lambda source: init_from(source, 1),
    '--init_from, 2 processes': lambda source: init_from(source, 2),
  }


def _copy(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  shutil.rmtree(target, ignore_errors=True)
  return shutil.copytree(source, target)


def table(rows: dict[str, Any]) -> str:
  """Returns Markdown: a row for each run or command.

  Args:
    rows: Rows by name.
  """
  lines = [
    '| reader | fingerprints of all arrays | largest relative difference |',
    '|---|---|---:|',
  ]
  for name, row in rows.items():
    same = row.get('same_fingerprints')
    shown = '' if same is None else 'equal' if same else 'DIFFERENT'
    lines.append(f'| {name} | {shown} | {row["difference"]:.0e} |')
  return '\n'.join(lines)
