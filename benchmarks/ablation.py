"""python -m benchmarks.ablation --workdir=DIR [--table]

configs/shakespeare.py without each of its parts, one at a time, in an eighth
of its steps. benchmarks/sweep.py says how it goes on; `python -m
benchmarks.report` puts the table into docs/recipe.md.
"""

import math
import statistics
from typing import Any

from benchmarks import config_runs, recipe, results, sweep
from benchmarks.routing_study import tell
from benchmarks.sweep import Run

SHORT = {'num_train_steps': 400, 'eval_interval': 200}
# {name: (what is taken out, changes)}.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  'nothing': ('none', {}),
  'muon': (
    'Muon, replaced by AdamW at 0.003',
    {'optimizer.type': 'AdamW', 'optimizer.learning_rate': 3e-3},
  ),
  'convolution': ('convolutions', {'model.conv_width': 1}),
  'rope': (
    'RoPE, replaced by learned positions',
    {'model.position': 'learned'},
  ),
  'zeros': ('outputs that start at zero', {'model.zero_outputs': 'false'}),
  'experts': (
    'experts, replaced by dense layers, equal minutes',
    {**recipe.DENSE, 'num_train_steps': 460},
  ),
  'context': (
    'half of the context, with twice as many windows',
    {'block_size': 128, 'batch_size': 16},
  ),
  'shared': (
    'the shared expert, replaced by two of four',
    {'moe.num_shared': 0, 'moe.top_k': 2, 'moe.router.type': 'TopK'},
  ),
  'width': (
    'experts of 512, replaced by twice as many of 256',
    {
      'moe.num_shared': 2,
      'moe.num_experts': 8,
      'moe.top_k': 2,
      'moe.d_ff': 256,
    },
  ),
  'qk_norm': ('normalized queries and keys', {'model.qk_norm': 'false'}),
  'norm': ('RMSNorm, replaced by LayerNorm', {'model.norm': 'LayerNorm'}),
  'penalty': ('the penalty', {'confidence_weight': 0.0}),
  'dropout': ('dropout', {'model.dropout_rate': 0.0}),
}
# Those that are trained on more than the first seed.
TELLING = (
  'nothing',
  'muon',
  'convolution',
  'zeros',
  'rope',
  'context',
  'experts',
)

RUNS = {
  f'{name}-{seed}': Run(recipe.CONFIG, {**SHORT, **changes}, seed)
  for seed in recipe.SEEDS
  for name, (_, changes) in VARIANTS.items()
  if seed == recipe.SEEDS[0] or name in TELLING
}


def table(figures: dict[str, Any]) -> str:
  """Markdown: what each thing is worth, most first."""
  found = sweep.by_variant(figures, RUNS)
  # Of the same seeds.
  whole = {r['seed']: config_runs.loss(r) for r in found.get('nothing', ())}
  more = {
    name: statistics.fmean(
      config_runs.loss(r) - whole.get(r['seed'], math.nan) for r in runs
    )
    for name, runs in found.items()
  }
  lines = [
    '| removed part | val cross-entropy | difference '
    '| parameters (active) | s per step |',
    '|---|---:|---:|---:|---:|',
  ]
  for name in sorted(more, key=lambda name: -more[name]):
    runs, result = found[name], found[name][0]['result']
    seconds = statistics.median(1 / r['result']['steps_per_sec'] for r in runs)
    lines.append(
      f'| {VARIANTS[name][0]} | {tell(map(config_runs.loss, runs))} '
      f'| {"" if name == "nothing" else f"{more[name]:+.4f}"} '
      f'| {result["num_params"]:,} ({result["num_active_params"]:,}) '
      f'| {seconds:.3f} |'
    )
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


if __name__ == '__main__':
  sweep.main('ablation', RUNS, table, __doc__)
