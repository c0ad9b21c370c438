"""python -m benchmarks.upcycling --workdir=DIR [--table]

Upcycling on Tiny Shakespeare: a dense run is trained, then continued dense, or
with experts that start from its layers. Experts from scratch train for as many
steps as both together. Equal minutes are read off longer runs, by the seconds
of steps that take turns in one process. benchmarks/sweep.py says how an
interrupted study resumes; `python -m benchmarks.report` puts the table into
docs/guides/using.md.
"""

from collections.abc import Mapping, Sequence
import math
import pathlib
import statistics
from typing import Any

import numpy as np

from benchmarks import peers, results, sweep
from benchmarks.routing_study import spread
from benchmarks.sweep import Earlier, Run
from benchmarks.variant import Variant

# Steps of the dense run, and of each run that starts from it.
BEFORE, AFTER = 1500, 1500
WIDTH = 256  # Of the dense layers.
SEEDS = (0, 1, 2)
METRIC = 'val/cross_entropy'

# The learning rate stays constant after its warm-up, so that a run up to a step
# equals a shorter run.
COMMON = {
  'precision': 'float32',
  'batch_size': 16,
  'block_size': 64,
  'eval_interval': 250,
  'eval_iters': 0,
  'model.d_model': 96,
  'model.num_layers': 4,
  'moe.num_experts': 8,
  'moe.top_k': 2,
  'moe.d_ff': WIDTH,
  'moe.dense_d_ff': WIDTH,
  'moe.balance': 'all_choices',
  'optimizer.learning_rate': 1e-3,
  'checkpoint.keep_latest': 1,
  'sample.num_tokens': 0,
}
_DENSE = {'moe.first_dense_layers': 4}

# {name: (what it is, changes, starts from the dense run, steps)}. Runs whose
# steps are quicker are longer, for the comparison at equal minutes.
VARIANTS: dict[str, tuple[str, dict[str, Any], bool, int]] = {
  'source': ('', _DENSE, False, BEFORE),
  'dense': ('the dense run, continued', _DENSE, True, 2 * AFTER),
  'copies': ('`Copies`', {'upcycle.type': 'Copies'}, True, AFTER),
  'groups': (
    '`VirtualGroups` of 2 halves',
    {
      'upcycle.type': 'VirtualGroups',
      'moe.num_experts': 16,
      'moe.top_k': 4,
      'moe.d_ff': WIDTH // 2,
    },
    True,
    AFTER,
  ),
  'drop': (
    '`Drop`, ratio 0.5',
    {'upcycle.type': 'Drop', 'upcycle.ratio': 0.5},
    True,
    AFTER,
  ),
  'scratch': ('experts from scratch', {}, False, BEFORE + AFTER),
}

# Changes of each variant with another step.
STEPS = {
  'dense': _DENSE,
  'copies': {},
  'groups': {
    key: value
    for key, value in VARIANTS['groups'][1].items()
    if not key.startswith('upcycle')
  },
}


def _run(name: str, seed: int) -> Run:
  _, changes, is_second, num_steps = VARIANTS[name]
  source = {'init_from': Earlier(f'source-{seed}')} if is_second else {}
  changes = {**COMMON, 'num_train_steps': num_steps, **changes, **source}
  return Run('configs/base.py', changes, seed)


RUNS = {
  f'{name}-{seed}': _run(name, seed) for seed in SEEDS for name in VARIANTS
}


def _steps(_: pathlib.Path) -> dict[str, Any]:
  """Returns the seconds of a step of each variant, which take turns."""
  variants = {
    name: Variant({k: str(v) for k, v in {**COMMON, **changes}.items()})
    for name, changes in STEPS.items()
  }
  taken: dict[str, list[float]] = {name: [] for name in variants}
  for i in range(42):
    for name, variant in variants.items():
      seconds = variant()
      taken[name] += [seconds] if i >= 2 else []
  return {'step': {k: peers.summary(v) for k, v in taken.items()}}


def _loss_at(run: Mapping[str, Any], step: float) -> float:
  """Returns the loss at a step, between two evaluations of a run."""
  steps, losses = zip(
    *((r['step'], r[METRIC]) for r in run['rows']), strict=True
  )
  if not steps[0] <= step <= steps[-1]:
    return math.nan
  return float(np.interp(step, steps, losses))


def num_steps_at_equal_minutes(
  variant: str, step: Mapping[str, Mapping[str, float]]
) -> float:
  """Returns the steps of a variant that take as long as `Copies`.

  Args:
    variant: Name of the variant.
    step: Seconds of a step, by the name of a variant.
  """
  dense, copies = step['dense']['median_sec'], step['copies']['median_sec']
  own = step[variant if variant in step else 'copies']['median_sec']
  seconds = AFTER * copies
  if not VARIANTS[variant][2]:  # The dense run before it takes time, too.
    seconds += BEFORE * dense
  return seconds / own


def table(figures: dict[str, Any]) -> str:
  """Returns Markdown: losses at equal steps and at equal minutes."""
  step = figures['step']
  of_variant = {
    name: {run['seed']: run for run in runs}
    for name, runs in sweep.by_variant(figures, RUNS).items()
  }
  rows = []
  for name, (what, _, is_second, _) in VARIANTS.items():
    if not what:
      continue
    ends = (
      AFTER if is_second else BEFORE + AFTER,
      num_steps_at_equal_minutes(name, step),
    )
    cells = [what]
    for i, end in enumerate(ends):
      dense_end = (AFTER, num_steps_at_equal_minutes('dense', step))[i]
      pairs = [
        (_loss_at(run, end), _loss_at(of_variant['dense'][seed], dense_end))
        for seed, run in of_variant[name].items()
      ]
      cells.append(f'{statistics.fmean(own for own, _ in pairs):.4f}')
      cells.append(
        _difference([own - dense for own, dense in pairs])
        if name != 'dense'
        else ''
      )
    result = next(iter(of_variant[name].values()))['result']
    cells.append(f'{result["num_params"]:,} ({result["num_active_params"]:,})')
    rows.append(f'| {" | ".join(cells)} |')
  return '\n'.join(
    [
      '| start | loss at equal steps | minus dense | loss at equal minutes '
      '| minus dense | parameters (active) |',
      '|---|---:|---|---:|---|---:|',
      *rows,
      '',
      results.describe(figures['machine']),
    ]
  )


def _difference(values: Sequence[float]) -> str:
  """Returns the mean of paired differences, and the least and the largest."""
  mean, least, most = spread(values)
  return f'{mean:+.4f} ({least:+.4f} to {most:+.4f})'


if __name__ == '__main__':
  sweep.main('upcycling', RUNS, table, __doc__, _steps)
