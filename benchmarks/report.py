"""python -m benchmarks.report [--name=base --workdir=DIR --exact=FILE]

Writes benchmarks/results/<name>.json from a run's metrics.jsonl and
result.json; without --workdir, nothing. Then makes all tables in README.md and
docs/ anew from benchmarks/results, each between its two markers.
"""

import functools
import json
import pathlib
import re

from absl import app, flags

from benchmarks import (
  collapse,
  generate,
  peers,
  results,
  scaling,
  step_time,
)

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a finished run.')
_NAME = flags.DEFINE_string('name', 'base', 'Of the figures: one of RUNS.')
_EXACT = flags.DEFINE_string(
  'exact', None, 'What python -m nanomoe.evaluate --step=best printed.'
)

ROOT = pathlib.Path(__file__).parent.parent

# {name of the figures: what was run}.
RUNS = {
  'base': 'configs/base.py',
  'quick': 'configs/quick.py',
  'quick_top1': 'configs/quick.py --config.moe.top_k=1',
}


def figures(workdir: pathlib.Path, exact: pathlib.Path) -> dict:
  """What the table shows: evaluations, and the run's result."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  metrics = [json.loads(line) for line in lines]
  train = {m['step']: m for m in metrics if 'train/loss' in m}
  rows = [
    {
      'step': m['step'],
      'train/cross_entropy': train[max(s for s in train if s <= m['step'])][
        'train/cross_entropy'
      ],
      'val/cross_entropy': m['val/cross_entropy'],
      'val/bits_per_char': m['val/bits_per_char'],
      'val/aux_loss': m['val/aux_loss'],
    }
    for m in metrics
    if 'val/cross_entropy' in m and m['step'] >= min(train)
  ]
  result = json.loads((workdir / 'result.json').read_text())
  kept = (
    'status',
    'step',
    'num_params',
    'num_active_params',
    'corpus',
    'best_val_loss',
    'best_step',
    'train_seconds',
    'steps_per_sec',
    'tokens_per_sec',
    'seconds_by_phase',
    'peak_memory_bytes',
    'versions',
    'revision',
  )
  return {
    'rows': rows,
    'exact': {
      key: value
      for key, value in json.loads(exact.read_text()).items()
      if key != 'workdir'
    },
    'result': {key: result[key] for key in kept},
    'max_aux_loss': max(
      m['train/aux_loss']
      for m in metrics
      if 'train/loss' in m and m['step'] >= 250
    ),
  }


def table(data: dict) -> str:
  """Markdown: a row an evaluation, and a line that sums up."""
  lines = [
    '| step | train cross-entropy | val cross-entropy | bits per character '
    '| aux loss |',
    '|---:|---:|---:|---:|---:|',
  ]
  best = None
  for row in data['rows']:
    better = best is None or row['val/cross_entropy'] < best
    best = row['val/cross_entropy'] if better else best
    lines.append(
      f'| {row["step"]} | {row["train/cross_entropy"]:.4f} '
      f'| {row["val/cross_entropy"]:.4f}{" ★" if better else ""} '
      f'| {row["val/bits_per_char"]:.4f} | {row["val/aux_loss"]:.4f} |'
    )
  result, exact = data['result'], data['exact']
  wall = sum(result['seconds_by_phase'].values()) / 60
  lines += [
    '',
    f'Validation cross-entropy of step {exact["step"]} on the whole split, '
    f'each of {exact["num_tokens"]:,} targets once: '
    f'**{exact["cross_entropy"]:.4f}** ({exact["bits_per_char"]:.4f} bits per '
    f'character). Largest auxiliary loss from step 250 on: '
    f'{data["max_aux_loss"]:.3f} (4 is uniform routing). '
    f'{wall:.0f} minutes on 2 cores, of them '
    f'{result["seconds_by_phase"]["evaluate"] / 60:.0f} of evaluation; '
    f'{1 / result["steps_per_sec"]:.3f} s a step, '
    f'{result["peak_memory_bytes"] / 1e9:.2f} GB at most. Of revision '
    f'{result["revision"][:7]}.',
  ]
  return '\n'.join(lines)


def _configs() -> str:
  """A row for each run."""
  lines = [
    '| config | parameters (for a token) | steps | val cross-entropy '
    '| minutes | s a step |',
    '|---|---:|---:|---:|---:|---:|',
  ]
  for name, command in RUNS.items():
    data = results.read(name)
    if not data:
      continue
    result = data['result']
    minutes = sum(result['seconds_by_phase'].values()) / 60
    lines.append(
      f'| `{command}` | {result["num_params"]:,} '
      f'({result["num_active_params"]:,}) | {result["step"]} '
      f'| {data["exact"]["cross_entropy"]:.4f} | {minutes:.0f} '
      f'| {1 / result["steps_per_sec"]:.3f} |'
    )
  return '\n'.join(lines)


def _quick() -> str | None:
  """Two experts for a token against one."""
  lines = [
    '| `moe.top_k` | val cross-entropy | entropy of the router, by layer '
    '| largest over mean load, by layer | s a step |',
    '|---:|---:|---|---|---:|',
  ]
  for top_k, name in ((2, 'quick'), (1, 'quick_top1')):
    if not (data := results.read(name)):
      return None
    exact = data['exact']
    layers = [
      ' '.join(f'{x:.2f}' for x in values)
      for values in (
        exact['router_entropy'],
        exact['max_over_mean_load'],
      )
    ]
    seconds = 1 / data['result']['steps_per_sec']
    lines.append(
      f'| {top_k} | {exact["cross_entropy"]:.4f} | {layers[0]} | {layers[1]} '
      f'| {seconds:.3f} |'
    )
  return '\n'.join(lines)


def main(argv):
  del argv
  if _WORKDIR.value:
    data = figures(pathlib.Path(_WORKDIR.value), pathlib.Path(_EXACT.value))
    path = ROOT / 'benchmarks' / 'results' / f'{_NAME.value}.json'
    path.write_text(json.dumps(data, indent=1) + '\n')
  for document, tables in TABLES.items():
    path = ROOT / document
    text = path.read_text()
    for name, make in tables.items():
      if made := make():
        text = _between(document, text, name, made)
    path.write_text(text)


def _base() -> str | None:
  data = results.read('base')
  return table(data) if data else None


def _variants() -> str | None:
  measured = results.read('step_time')
  return step_time.table(measured) if measured else None


def _scaling() -> str | None:
  measured = results.read('scaling')
  return scaling.table(measured) if measured else None


def _against() -> str | None:
  """Every peer's rows, of what was measured."""
  rows, machines = [], []
  for peer in peers.PEERS:
    for name, make in [
      (f'step_time-{peer}', functools.partial(step_time.peer_rows, peer)),
      (f'generate-{peer}', generate.rows),
    ]:
      if measured := results.read(name):
        rows += make(measured)
        machines.append(results.describe(measured['machine']))
  if not rows:
    return None
  head = ['| what | against | ours | theirs | theirs / ours |']
  lines = [*head, '|---|---|---:|---:|---:|', *rows, '']
  return '\n'.join([*lines, ' '.join(dict.fromkeys(machines))])


def _collapse() -> str | None:
  measured = results.read('collapse')
  return collapse.table(measured) if measured else None


TABLES = {
  'README.md': {
    'base': _base,
    'configs': _configs,
    'quick': _quick,
    'against': _against,
    'step_time': _variants,
    'scaling': _scaling,
  },
  'docs/routing.md': {'collapse': _collapse},
}


def _between(document: str, text: str, name: str, new: str) -> str:
  begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
  text, count = re.subn(
    f'{begin}.*?{end}', lambda _: f'{begin}\n{new}\n{end}', text, flags=re.S
  )
  if count != 1:
    raise SystemExit(f'{document} needs one {begin} ... {end}, has {count}')
  return text


if __name__ == '__main__':
  app.run(main)
