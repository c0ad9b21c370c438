"""python -m benchmarks.routing_study --workdir=DIR [--table]

What routing is worth: one small transformer on Tiny Shakespeare, trained for
equal steps, in which only the feed-forward layers differ. A token's experts are
384 hidden units wide together, and all of a layer's 1536, unless a variant says
otherwise. All on one seed, the most telling on three. benchmarks/sweep.py says
how it goes on; `python -m benchmarks.report` puts the table into
docs/routing.md.
"""

from collections.abc import Iterable
import statistics
from typing import Any

from benchmarks import results, sweep
from benchmarks.sweep import Run

# In float32, so that any machine has the same figures, but for its rounding.
COMMON = {
  'precision': 'float32',
  'num_train_steps': 1500,
  'batch_size': 16,
  'block_size': 64,
  'eval_interval': 250,
  'eval_iters': 0,
  'model.d_model': 96,
  'moe.num_experts': 8,
  'moe.top_k': 2,
  'moe.d_ff': 192,
  'moe.balance': 'all_choices',
  'moe.aux_weight': 0.01,
  'optimizer.learning_rate': 2e-3,
  'optimizer.schedule.type': 'warmup_cosine',
  'optimizer.schedule.warmup_steps': 100,
  'checkpoint.keep_latest': 1,
  'sample.num_tokens': 0,
}

_WIDE = {'moe.num_experts': 4, 'moe.top_k': 1, 'moe.d_ff': 384}
_FINE = {'moe.num_experts': 16, 'moe.top_k': 4, 'moe.d_ff': 96}
_SWITCH = {**_WIDE, 'moe.router.type': 'Softmax'}
_SIGMOID = {'moe.router.type': 'Sigmoid', 'moe.aux_weight': 0}

# {name: (what it is, changes)}.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  'topk': ('`TopK`, softmax over the chosen (the default)', {}),
  'sigmoid': (
    '`Sigmoid`, balanced by its bias only (DeepSeek-V3)',
    _SIGMOID,
  ),
  'softmax': (
    '`Softmax` over all, unchanged weights (OLMoE)',
    {'moe.router.type': 'Softmax'},
  ),
  'dense': (
    'dense, 384 wide, equal active parameters',
    {'moe.first_dense_layers': 4, 'moe.dense_d_ff': 384},
  ),
  'switch': ('`Softmax`, 1 of 4 experts of 384 (Switch)', _SWITCH),
  'expert_choice': (
    '`ExpertChoice` (Zhou et al. 2022)',
    {'moe.router.type': 'ExpertChoice', 'moe.aux_weight': 0},
  ),
  'hash': ('`Hash` (Roller et al. 2021)', {'moe.router.type': 'Hash'}),
  'noisy': (
    '`NoisyTopK` (Shazeer et al. 2017)',
    {'moe.router.type': 'NoisyTopK'},
  ),
  'unbalanced': ('`TopK` without a balance loss', {'moe.aux_weight': 0}),
  'shared': (
    '`TopK`, 3 of 15 experts of 96, and a shared one (DeepSeekMoE)',
    {**_FINE, 'moe.num_experts': 15, 'moe.top_k': 3, 'moe.num_shared': 1},
  ),
  'switch_capacity': (
    '`Softmax`, 1 of 4 experts of 384, `capacity` dispatch, factor 1',
    {**_SWITCH, 'moe.dispatch': 'capacity', 'moe.capacity_factor': 1},
  ),
  'topk_1': (
    '`TopK`, 1 of 4 experts of 384, constant weight 1',
    _WIDE,
  ),
  'fine': ('`TopK`, 4 of 16 experts of 96', _FINE),
  'dense_total': (
    'dense, 1536 wide, equal total parameters',
    {'moe.first_dense_layers': 4, 'moe.dense_d_ff': 1536},
  ),
  'groups': (
    '`Sigmoid`, experts of 2 of 4 groups',
    {**_SIGMOID, 'moe.router.num_groups': 4, 'moe.router.groups_kept': 2},
  ),
}

# Those that are trained on more than the first seed.
TELLING = ('topk', 'softmax', 'sigmoid', 'hash', 'dense')
SEEDS = (0, 1, 2)


def _run(name: str, seed: int) -> Run:
  return Run('configs/base.py', {**COMMON, **VARIANTS[name][1]}, seed)


RUNS = {
  f'{name}-{seed}': _run(name, seed)
  for name in VARIANTS
  for seed in (SEEDS if name in TELLING else SEEDS[:1])
}


def table(figures: dict[str, Any]) -> str:
  """Markdown: causal ones first, the lowest loss first."""
  of_variant = sweep.by_variant(figures, RUNS)
  rows = sorted(
    (not runs[0]['is_causal'], spread(map(loss, runs))[0], name)
    for name, runs in of_variant.items()
  )
  lines = [
    '| variant | val cross-entropy | largest over mean load | router entropy '
    '| dropped | parameters (active) | GFLOP per step | s per step | causal |',
    '|---|---:|---:|---:|---:|---:|---:|---:|---|',
    *(_row(name, of_variant[name]) for _, _, name in rows),
  ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def _row(name: str, runs: list[dict[str, Any]]) -> str:
  first = runs[0]
  load, entropy, dropped = (
    _mean([x for r in runs for x in r['last'].get(f'val/{key}', [])], unit)
    for key, unit in (
      ('max_over_mean_load', '.2f'),
      ('router_entropy', '.2f'),
      ('dropped_fraction', '.1%'),
    )
  )
  result = first['result']
  seconds = statistics.median(1 / r['result']['steps_per_sec'] for r in runs)
  cells = [
    VARIANTS[name][0],
    tell(map(loss, runs)),
    load,
    entropy,
    dropped,
    f'{result["num_params"]:,} ({result["num_active_params"]:,})',
    f'{first["gflop"]:.2f}',
    f'{seconds:.3f}',
    'yes' if first['is_causal'] else '**no**',
  ]
  return f'| {" | ".join(cells)} |'


def _mean(values: list[float], unit: str) -> str:
  return format(statistics.fmean(values), unit) if values else ''


def loss(run: dict[str, Any]) -> float:
  """Of the last evaluation, over the whole validation split."""
  return run['rows'][-1]['val/cross_entropy']


def spread(values: Iterable[float]) -> tuple[float, float, float]:
  """Mean, least, most."""
  values = list(values)
  return statistics.fmean(values), min(values), max(values)


def tell(values: Iterable[float]) -> str:
  values = list(values)
  mean, least, most = spread(values)
  if len(values) == 1:
    return f'{mean:.4f}'
  return f'{mean:.4f} ({least:.4f} to {most:.4f})'


if __name__ == '__main__':
  sweep.main('routing_study', RUNS, table, __doc__)
