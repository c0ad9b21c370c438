"""python -m benchmarks.report [--name=base --workdir=DIR --exact=FILE]

Writes benchmarks/results/<name>.json from a run's metrics.jsonl and
result.json; without --workdir, nothing. Then makes all tables of the documents
anew from benchmarks/results, each between its two markers, and the line at the
top of each config that says what it gave.
"""

from collections.abc import Callable
import functools
import json
import pathlib
import re
from typing import Any

from absl import app, flags

from benchmarks import (
  ablation,
  by_position,
  collapse,
  config_runs,
  devices,
  exports,
  generate,
  layer,
  memory,
  parity,
  peers,
  plan_errors,
  precision_curves,
  processes,
  profile,
  recipe,
  restores,
  results,
  routing_study,
  scaling,
  step_time,
  time_to_loss,
  upcycling,
)
from nanomoe.config import home

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a finished run.')
_NAME = flags.DEFINE_string('name', 'base', 'Of the figures: one of RUNS.')
_EXACT = flags.DEFINE_string(
  'exact', None, 'What python -m nanomoe.evaluate --step=best printed.'
)

ROOT = pathlib.Path(__file__).parent.parent

LINES = 12  # Of a sample.

# {name of the figures: what was run}.
RUNS = {
  'base': 'configs/base.py',
  'quick': 'configs/quick.py',
  'quick_top1': 'configs/quick.py --config.moe.top_k=1',
}


def figures(workdir: pathlib.Path, exact: pathlib.Path) -> dict:
  """What the table shows: evaluations, and the run's result."""
  run = results.of_run(workdir)
  return {
    'rows': run['rows'],
    'sample': run['sample'],
    'exact': {
      key: value
      for key, value in json.loads(exact.read_text()).items()
      if key != 'workdir'
    },
    'result': run['result'],
    'max_aux_loss': max(
      m['train/aux_loss']
      for m in results.metrics(workdir)
      if 'train/loss' in m and m['step'] >= 250
    ),
  }


def table(data: dict) -> str:
  """Returns Markdown: one row per evaluation, and a summary."""
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
    f'character). The largest auxiliary loss from step 250 on is '
    f'{data["max_aux_loss"]:.3f} (4 is uniform routing). '
    f'The run took {wall:.0f} minutes on 2 cores, of them '
    f'{result["seconds_by_phase"]["evaluate"] / 60:.0f} of evaluation: '
    f'{1 / result["steps_per_sec"]:.3f} s per step, '
    f'{result["peak_memory_bytes"] / 1e9:.2f} GB at most. Revision '
    f'{result["revision"][:7]}, seed 0.',
  ]
  return '\n'.join(lines)


def runs() -> dict[str, dict]:
  """{config file, with what differs from it: figures} of all that was run."""
  found = {command: results.read(name) for name, command in RUNS.items()}
  study = results.read('config_runs') or {'runs': {}}
  found |= {run['config']: run for run in study['runs'].values()}
  study = results.read('recipe') or {'runs': {}}
  found[recipe.CONFIG] = study['runs'].get('recipe-0')
  return {command: data for command, data in found.items() if data}


def measured(config: str) -> str:
  """The line at the top of a config file."""
  data = runs().get(config)
  if not data:
    return 'Measured: not yet.'
  loss, minutes = config_runs.loss(data), config_runs.minutes(data)
  return (
    f'Measured: val cross-entropy {loss:.4f}, {data["result"]["step"]} steps '
    f'in {minutes:.0f} minutes on 2 cores.'
  )


def _configs() -> str:
  """A row for each run."""
  rows = [config_runs.row(command, data) for command, data in runs().items()]
  return '\n'.join([*config_runs.HEAD, *rows])


def _texts() -> str:
  """The first lines that each of the two wrote."""
  written = []
  for config in ('configs/base.py', recipe.CONFIG):
    if sample := runs().get(config, {}).get('sample'):
      lines = [f'    {line}'.rstrip() for line in sample.strip().splitlines()]
      written.append('\n'.join([f'`{config}`:', '', *lines[:LINES]]))
  return '\n\n'.join(written)


def _sample() -> str:
  """Returns the first lines that the recipe's model wrote."""
  sample = (runs().get(recipe.CONFIG) or {}).get('sample', '')
  lines = sample.strip().splitlines()[1:6]  # The first line is half a line.
  return '\n'.join(f'    {line}'.rstrip() for line in lines)


def _router() -> str:
  """Returns the first example of the page on plug-ins."""
  text = (ROOT / 'docs' / 'plugins.md').read_text()
  begin = text.index('```python')
  return text[begin : text.index('```', begin + 3) + 3]


def _quick() -> str | None:
  """Two experts for a token against one."""
  lines = [
    '| `moe.top_k` | val cross-entropy | router entropy by layer, nats '
    '| largest over mean load by layer | s per step |',
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
    data = figures(
      pathlib.Path(home.expand(_WORKDIR.value, '--workdir')),
      pathlib.Path(home.expand(_EXACT.value, '--exact')),
    )
    path = ROOT / 'benchmarks' / 'results' / f'{_NAME.value}.json'
    path.write_text(json.dumps(data, indent=1) + '\n')
  for document, tables in TABLES.items():
    text = (ROOT / document).read_text()
    for name, make in tables.items():
      text = _between(text, name, make() or '', document)
    if document == 'README.md':
      for name, number in numbers().items():
        text = _between(text, name, number, document, end_of_line='')
    (ROOT / document).write_text(text)
  for path in (ROOT / 'configs').glob('*.py'):
    line = measured(f'configs/{path.name}')
    text = path.read_text()
    path.write_text(re.sub(r'^Measured: .*', line, text, flags=re.MULTILINE))


def _against() -> str | None:
  """Every peer's rows, of what was measured, and on which machine."""
  rows, machines = [], []
  for peer in peers.PEERS:
    for name, make in [
      (f'step_time-{peer}', functools.partial(step_time.peer_rows, peer)),
      (f'generate-{peer}', generate.rows),
    ]:
      if measured := results.read(name):
        machine = results.describe(measured['machine'])
        machines += [] if machine in machines else [machine]
        rows += [
          f'{row} {machines.index(machine) + 1} |' for row in make(measured)
        ]
  if not rows:
    return None
  lines = [
    '| measurement | peer | NanoMoE | peer | peer / NanoMoE | machine |',
    '|---|---|---:|---:|---:|---:|',
    *rows,
    '',
    *(f'{i}. {machine}' for i, machine in enumerate(machines, 1)),
  ]
  return '\n'.join(lines)


def _table(
  name: str, make: Callable[[dict], str], part: str | None = None
) -> Callable[[], str | None]:
  """Returns a maker of the table of some figures.

  Args:
    name: Name of the figures.
    make: Makes the table.
    part: Key of the figures without which there is no table; None for any.
  """

  def make_if_measured() -> str | None:
    figures = results.read(name) or {}
    return make(figures) if figures and part in (None, *figures) else None

  return make_if_measured


def _study(module: Any) -> Callable[[], str | None]:
  """Returns a maker of the table of a module's figures."""
  return _table(module.__name__.rpartition('.')[2], module.table)


def _memory(part: str) -> Callable[[], str | None]:
  return _table('memory', memory.TABLES[part], part)


# {document: {marker: maker of the table; None before it is measured}}.
TABLES = {
  'README.md': {'quick': _quick, 'router': _router, 'sample': _sample},
  'docs/tutorial.md': {'quick': _quick},
  'docs/results.md': {
    'base': _table('base', table),
    'configs': _configs,
    'texts': _texts,
    'quick': _quick,
    'against': _against,
    'step_time': _study(step_time),
    'scaling': _study(scaling),
    'accumulation': _memory('accumulation'),
    'compilation': _memory('compilation'),
    'layer': _table('layer-bfloat16', layer.table),
    'layer_float32': _table('layer-float32', layer.table),
  },
  'docs/guides/configuration.md': {
    'remat': _memory('remat'),
    'logits_chunk': _memory('logits_chunk'),
  },
  'docs/guides/devices.md': {
    'parity': _study(parity),
    'devices': _study(devices),
    'restores': _study(restores),
    **{
      f'processes_{part}': functools.partial(processes.table, part)
      for part in processes.TABLES
    },
  },
  'docs/guides/transformers.md': {
    'exports': _table('exports', exports.agreement, 'exports'),
    'export_costs': _table('exports', exports.costs, 'costs'),
  },
  'docs/guides/using.md': {'upcycling': _study(upcycling)},
  'docs/routing.md': {
    'routing_study': _study(routing_study),
    'collapse': _study(collapse),
  },
  'docs/recipe.md': {
    'recipe': _table('recipe', recipe.whole),
    'pairs': _table('recipe', recipe.pairs),
    'ablation': _study(ablation),
    'race': _table('time_to_loss-nano-moe-jax', time_to_loss.table),
    'by_position': _study(by_position),
  },
  'docs/guides/planning.md': {
    'plan_configs': _table('plan', plan_errors.configs_table, 'configs'),
    'plan_large': _table('plan', plan_errors.large_table, 'large'),
    'plan_exchange': _table('plan', plan_errors.exchange_table, 'exchange'),
  },
  'benchmarks/NOTES.md': {
    'profile': _study(profile),
    'precision_curves': _study(precision_curves),
  },
}


def numbers() -> dict[str, str]:
  """Returns the numbers in the sentences of README.md, by marker."""
  jax, torch, text, race, collapse, faults = (
    results.read(name) or {}
    for name in (
      'step_time-nano-moe-jax',
      'step_time-torch-dense',
      'generate-nano-moe-jax',
      'time_to_loss-nano-moe-jax',
      'collapse',
      'faults',
    )
  )
  seconds = {k: v['median_sec'] for k, v in jax['step'].items()}
  per_character = {
    side: row['median_sec'] / row['num_characters']
    for side, row in text['generation'].items()
  }
  raised = collapse['runs']['raise']
  outcomes = [case['outcome'] for case in faults['cases'].values()]
  return {
    'faults': str(len(outcomes)),
    'faults_passed': str(outcomes.count('passed')),
    'step': f'{seconds["ours"]:.3f}',
    'peer_step': f'{seconds["nano-moe-jax"]:.3f}',
    'sooner': f'{race["theirs"]["sec"] / race["ours"]["sec"]:.0f}',
    'faster_text': (
      f'{per_character["nano-moe-jax"] / per_character["ours"]:.0f}'
    ),
    'first_alarm': str(raised['first_alarm']),
    'quiet_from': str(raised['quiet_from']),
    'dense_step': _ratio(torch['step']),
    'dense_evaluation': _ratio(torch['evaluation']),
  }


def _ratio(sides: dict[str, dict]) -> str:
  """Returns the peer's time in units of NanoMoE's."""
  return (
    f'{sides["torch-dense"]["median_sec"] / sides["ours"]["median_sec"]:.2f}'
  )


def _between(
  text: str, name: str, new: str, document: str, end_of_line: str = '\n'
) -> str:
  begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
  new = f'{begin}{end_of_line}{new}{end_of_line}{end}'
  text, count = re.subn(f'{begin}.*?{end}', lambda _: new, text, flags=re.S)
  if count != 1:
    raise SystemExit(f'{document} needs one {begin} ... {end}, has {count}')
  return text


if __name__ == '__main__':
  app.run(main)
