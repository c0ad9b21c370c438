"""python -m benchmarks.plan_errors [--parts=configs,large,exchange]

Compares plans with runs: for each config that trains on this machine, the bytes
of the compiled step by XLA's analysis and the peak resident set size of a run
of three steps. Makes two plans of large models, and counts the traffic of a
small layer of experts on meshes of virtual devices. Writes
benchmarks/results/plan.json; parts that are left out keep their figures.
"""

from collections.abc import Callable
import json
import os
import subprocess
import sys
from typing import Any

from absl import flags

from benchmarks import results
from nanomoe.config import overrides
from nanomoe.config.schema import Config
from nanomoe.moe.dispatch import exchange as exchange_lib
from nanomoe.planning import collectives, estimate, hardware, vocabulary
from nanomoe.run import cli

PARTS = ('configs', 'large', 'exchange')
_FLAGS = flags.FlagValues()
_PARTS = flags.DEFINE_list(
  'parts', [*PARTS], 'Parts to measure.', flag_values=_FLAGS
)

# Configs that train on a CPU.
CONFIGS = (
  'base',
  'deepseek_nano',
  'dense',
  'expert_choice',
  'mixtral_nano',
  'quick',
  'qwen3_nano',
  'shakespeare',
  'short',
  'switch',
)
# A run is long enough for every program: steps, an evaluation, a checkpoint.
SHORT = {
  'num_train_steps': '3',
  'eval_interval': '3',
  'eval_iters': '2',
  'sample.num_tokens': '0',
}
# {name: (config, changes, vocabulary)}.
LARGE = {
  'configs/gpu_1b.py on 8 devices': (
    'gpu_1b',
    {'mesh.fsdp': '8'},
    50_257,
  ),
  '104 billion parameters on 4,096 devices': (
    'gpu_1b',
    {
      'batch_size': '4096',
      'mesh.data': '8',
      'mesh.fsdp': '8',
      'mesh.expert': '64',
      'model.d_model': '4096',
      'model.num_heads': '32',
      'model.num_kv_heads': '8',
      'model.num_layers': '32',
      'moe.num_experts': '64',
      'moe.top_k': '2',
      'moe.d_ff': '4096',
      'moe.first_dense_layers': '0',
    },
    50_304,
  ),
}
# A small layer of experts: 512 tokens on each device, whatever the axis.
LAYER = {
  'batch_size': '8',
  'block_size': '64',
  'precision': 'float32',
  'model.d_model': '64',
  'model.num_layers': '2',
  'model.dropout_rate': '0',
  'moe.num_experts': '64',
  'moe.top_k': '2',
  'moe.d_ff': '128',
  'moe.dispatch': 'dropless',
}
EXCHANGES = ('experts', 'tokens', 'all_to_all')
AXES = (2, 8, 64)  # Sizes of the expert axis that are compiled.


def _config(name: str, changes: dict[str, str]) -> Config:
  config = overrides.load_file(f'configs/{name}.py')
  return overrides.apply(config, [*changes.items()])


def of_config(name: str) -> dict[str, Any]:
  """Returns the plan of a config beside a short run of it."""
  config = _config(name, {})
  plan = estimate.make(config, vocabulary.size(config), estimate.Target())
  process = subprocess.run(
    [
      sys.executable,
      '-m',
      'benchmarks.workers.peak',
      f'configs/{name}.py',
      *(f'{key}={value}' for key, value in SHORT.items()),
    ],
    capture_output=True,
    text=True,
    check=True,
    env={**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'},
  )
  run = json.loads(process.stdout.splitlines()[-1])
  memory = plan['memory']
  return {
    'plan': memory,
    'plan_process': plan['peak_process_bytes'],
    'flops_per_token': plan['flops_per_token'],
    'active_flops_per_token': plan['active_flops_per_token'],
    'run': run,
    'error_of_step': memory['total'] / (run['arguments'] + run['temporaries'])
    - 1,
    'error_of_process': plan['peak_process_bytes'] / run['peak'] - 1,
  }


def of_large(name: str) -> dict[str, Any]:
  """Returns a plan for devices that this machine lacks."""
  config_name, changes, vocab_size = LARGE[name]
  device = hardware.DEVICES['h200']
  target = estimate.Target(0, device.memory, device.peak_flops)
  return estimate.make(_config(config_name, changes), vocab_size, target)


def of_exchange(exchange: str, parts: int) -> dict[str, Any]:
  """Returns the traffic of one layer, by kind: that of 2 layers minus 1."""
  batch_size = parts * int(LAYER['batch_size'])
  changes = {
    **LAYER,
    'batch_size': str(batch_size),
    'mesh.expert': str(parts),
    'moe.exchange': exchange,
  }
  sizes = {'data': 1, 'fsdp': 1, 'expert': parts, 'tensor': 1}
  answer = estimate.ask(
    {
      'config': _config('base', changes).to_dict(),
      'vocab_size': 65,
      'sizes': sizes,
      'compiled_sizes': sizes,
      'depths': [1, 2],
      'batch_sizes': [batch_size],
    },
    parts,
  )
  one, two = (collectives.from_json(p[4]) for p in answer['points'])
  layer = collectives.extrapolate(one, two, 1)
  kinds = {
    kind: traffic.plus(one.kinds.get(kind, collectives.NONE), -1)
    for kind, traffic in layer.kinds.items()
  }
  return {kind: traffic._asdict() for kind, traffic in kinds.items()}


def configs_table(figures: dict[str, Any]) -> str:
  """Returns Markdown: a row for each config."""
  lines = [
    '| config | plan of a step | compiled | error | plan of the process '
    '| peak of the run | error |',
    '|---|---:|---:|---:|---:|---:|---:|',
  ]
  for name, row in figures['configs'].items():
    run = row['run']
    cells = [
      hardware.shown(row['plan']['total']),
      hardware.shown(run['arguments'] + run['temporaries']),
      f'{row["error_of_step"]:+.2%}',
      hardware.shown(row['plan_process']),
      hardware.shown(run['peak']),
      f'{row["error_of_process"]:+.0%}',
    ]
    lines.append(f'| `{name}.py` | {" | ".join(cells)} |')
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def large_table(figures: dict[str, Any]) -> str:
  """Returns Markdown: a column for each large plan."""
  plans = figures['large']
  shown = hardware.shown

  def row(name: str, read: Callable[[dict[str, Any]], str]) -> str:
    return f'| {name} | {" | ".join(map(read, plans.values()))} |'

  def term(name: str) -> str:
    return row(f'{name}, per device', lambda p: shown(p['memory'][name]))

  def received(kind: str) -> str:
    def read(plan: dict[str, Any]) -> str:
      traffic = plan['collectives'].get(kind)
      if not traffic:
        return '-'
      count, received = traffic['count'], traffic['received_bytes']
      return f'{count:,.0f} with {shown(received)}'

    return row(f'{kind}, received per device', read)

  kinds = sorted({k for plan in plans.values() for k in plan['collectives']})
  lines = [
    f'| | {" | ".join(plans)} |',
    f'|---|{"---:|" * len(plans)}',
    row('parameters', lambda p: f'{p["num_params"]:,}'),
    row('active parameters', lambda p: f'{p["num_active_params"]:,}'),
    row(
      'GFLOP per token, computed', lambda p: f'{p["flops_per_token"] / 1e9:.2f}'
    ),
    row(
      'GFLOP per token, active',
      lambda p: f'{p["active_flops_per_token"] / 1e9:.2f}',
    ),
    row('sequences in a batch', lambda p: f'{p["batch_size"]:,}'),
    *map(term, ('weights', 'gradients', 'optimizer', 'activations', 'logits')),
    term('total'),
    *map(received, kinds),
    row('largest batch in 141 GB', lambda p: f'{p["largest_batch_size"]:,}'),
    row(
      'days for the steps, at 40 % of 989 TFLOP/s',
      lambda p: f'{p["train_seconds"] / 86400:.2f}',
    ),
    row('steps', lambda p: f'{p["num_train_steps"]:,}'),
    row('s to plan', lambda p: f'{p["compiled"]["seconds"]:.0f}'),
  ]
  return '\n'.join(lines)


def exchange_table(figures: dict[str, Any]) -> str:
  """Returns Markdown: received bytes of one layer, a row for each axis."""
  lines = [
    '| `mesh.expert` | '
    + ' | '.join(f'`{e}`, formula | compiled' for e in EXCHANGES)
    + ' |',
    f'|---:|{"---:|---:|" * len(EXCHANGES)}',
  ]
  size = {key.rpartition('.')[2]: int(v) for key, v in LAYER.items() if _is(v)}
  experts = size['num_experts'] * size['d_ff'] * size['d_model']
  for parts in (1, 2, 4, 8, 16, 32, 64):
    moved = exchange_lib.moved_numbers(
      parts,
      num_tokens=size['batch_size'] * size['block_size'],
      top_k=size['top_k'],
      d_model=size['d_model'],
      num_weights=2 * experts,
    )
    cells = []
    for exchange in EXCHANGES:
      cells.append(hardware.shown(4 * moved[exchange]))
      kinds = figures['exchange'][exchange].get(str(parts))
      total = sum(x['received_bytes'] for x in kinds.values()) if kinds else 0
      cells.append(hardware.shown(total) if kinds else '')
    lines.append(f'| {parts} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def _is(value: str) -> bool:
  return value.isdecimal()


def main(_: None) -> int:
  figures = results.read('plan') or {}
  figures.pop('machine', None)
  if 'configs' in _PARTS.value:
    figures['configs'] = {}
    for name in CONFIGS:
      figures['configs'][name] = row = of_config(name)
      print(name, row['error_of_step'], row['error_of_process'], flush=True)
  if 'large' in _PARTS.value:
    figures['large'] = {name: of_large(name) for name in LARGE}
    results.write('plan', figures)
  if 'exchange' in _PARTS.value:
    figures['exchange'] = {
      exchange: {str(parts): of_exchange(exchange, parts) for parts in AXES}
      for exchange in EXCHANGES
    }
  results.write('plan', figures)
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
