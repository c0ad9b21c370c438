"""python -m benchmarks.precision_curves --workdir=DIR [--table]

Whether bfloat16 products train as float32's do: the transformer of
benchmarks/routing_study.py, three seeds of each, evaluated every 250 steps.
benchmarks/sweep.py says how it goes on; `python -m benchmarks.report` puts the
table into benchmarks/NOTES.md.
"""

from typing import Any

from benchmarks import results, routing_study, sweep
from benchmarks.routing_study import spread, tell
from benchmarks.sweep import Run

PRECISIONS = ('float32', 'bfloat16')
SEEDS = (0, 1, 2)
NUM_STEPS = 1000

RUNS = {
  f'{precision}-{seed}': Run(
    'configs/base.py',
    {
      **routing_study.COMMON,
      'precision': precision,
      'num_train_steps': NUM_STEPS,
    },
    seed,
  )
  for seed in SEEDS
  for precision in PRECISIONS
}


def table(figures: dict[str, Any]) -> str:
  """Markdown: each precision's mean over seeds, least and most."""
  lines = [
    f'| step | split | {" | ".join(PRECISIONS)} | difference of means '
    '| within the spread of seeds |',
    '|---:|---|---:|---:|---:|---|',
  ]
  of_precision = {
    precision: [
      run['rows']
      for name, run in figures['runs'].items()
      if name.partition('-')[0] == precision
    ]
    for precision in PRECISIONS
  }
  if all(of_precision.values()):
    for i, row in enumerate(of_precision[PRECISIONS[0]][0]):
      for split in ('train', 'val'):
        losses = [
          [rows[i][f'{split}/cross_entropy'] for rows in runs]
          for runs in of_precision.values()
        ]
        lines.append(_row(row['step'], split, *losses))
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def _row(step: int, split: str, exact: list[float], rounded: list[float]):
  mean, least, most = spread(exact)
  difference = spread(rounded)[0] - mean
  is_within = 'yes' if abs(difference) <= most - least else '**no**'
  return (
    f'| {step} | {split} | {tell(exact)} | {tell(rounded)} '
    f'| {difference:+.4f} | {is_within} |'
  )


if __name__ == '__main__':
  sweep.main('precision_curves', RUNS, table, __doc__)
