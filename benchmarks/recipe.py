"""python -m benchmarks.recipe --workdir=DIR [--table]

configs/shakespeare.py on three seeds, and on other texts; the same without
experts, for as many minutes. The same of what the recipe was before.
benchmarks/sweep.py says how it goes on; `python -m benchmarks.report` puts the
tables into docs/recipe.md.
"""

import statistics
from typing import Any

from benchmarks import config_runs, results, sweep, texts
from benchmarks.routing_study import tell
from benchmarks.sweep import Run

CONFIG = 'configs/shakespeare.py'
SEEDS = (0, 1, 2)

DENSE = {'moe.first_dense_layers': 4}  # As many parameters for a token.
MORE = {'model.dropout_rate': 0.15}  # Where experts are ahead.
# The earlier recipe; docs/recipe.md says why it was replaced.
EARLIER = {
  'num_train_steps': 2300,
  'eval_interval': 400,
  'model.dropout_rate': 0.05,
  'moe.num_shared': 0,
  'moe.top_k': 2,
  'moe.router.type': 'TopK',
}
PLAIN = {**EARLIER, 'confidence_weight': 0.0}  # And before that.
# So many steps were foreseen to take as long: the tables have what they took.
FINALS: dict[str, dict[str, Any]] = {
  'recipe': {},
  'dense': {**DENSE, 'num_train_steps': 3800},
  'half': {'num_train_steps': 1650},
  'half_dense': {**DENSE, 'num_train_steps': 1900},
  'more': MORE,
  'more_dense': {**MORE, **DENSE, 'num_train_steps': 3800},
  'earlier': EARLIER,
  'earlier_dense': {**EARLIER, **DENSE, 'num_train_steps': 2650},
  'plain': PLAIN,
  'plain_dense': {**PLAIN, **DENSE, 'num_train_steps': 2650},
  'plain_half': {**PLAIN, 'num_train_steps': 1200},
  'plain_half_dense': {**PLAIN, **DENSE, 'num_train_steps': 1350},
  'plain_quarter': {
    **PLAIN,
    'num_train_steps': 600,
    'eval_interval': 200,
  },
  'plain_quarter_dense': {
    **PLAIN,
    **DENSE,
    'num_train_steps': 690,
    'eval_interval': 200,
  },
}

RECIPE = {
  f'{name}-{seed}': Run(CONFIG, changes, seed)
  for seed in SEEDS
  for name, changes in FINALS.items()
}
# More seeds where there is enough text to tell experts from dense layers.
NUM_SEEDS = {'english': 1, 'python': 2, 'addresses': 3}
OTHER_TEXTS = {
  f'{text}-{name}{f"-{seed}" if seed else ""}': Run(
    CONFIG, {'data.path': texts.path(text), **FINALS[name]}, seed
  )
  for text, num_seeds in NUM_SEEDS.items()
  for seed in SEEDS[:num_seeds]
  for name in ('plain', 'plain_dense', *(() if seed else ('recipe', 'dense')))
}
RUNS = {**RECIPE, **OTHER_TEXTS}

# {(with experts, dense): which text, and how much of the recipe}.
PAIRS = {
  ('recipe', 'dense'): 'Tiny Shakespeare',
  ('half', 'half_dense'): 'Tiny Shakespeare, half of the steps',
  ('more', 'more_dense'): 'Tiny Shakespeare, a dropout of 0.15',
  ('earlier', 'earlier_dense'): 'Tiny Shakespeare, earlier recipe',
  ('plain', 'plain_dense'): 'Tiny Shakespeare, earlier recipe without penalty',
  ('plain_half', 'plain_half_dense'): (
    'Tiny Shakespeare, earlier recipe without penalty, half of the steps'
  ),
  ('plain_quarter', 'plain_quarter_dense'): (
    'Tiny Shakespeare, earlier recipe without penalty, a quarter of the steps'
  ),
  **{
    (f'{text}-{experts}', f'{text}-{dense}'): f'{what}{which}'
    for text, what in texts.TEXTS.items()
    for experts, dense, which in (
      ('recipe', 'dense', ''),
      ('plain', 'plain_dense', ', earlier recipe without penalty'),
    )
  },
}


def table(figures: dict[str, Any]) -> str:
  """Markdown: all of it."""
  return '\n\n'.join(make(figures) for make in (whole, pairs))


def whole(figures: dict[str, Any]) -> str:
  """Markdown: the recipe, unchanged, text by text."""
  lines = [
    f'| `{CONFIG}` on | val cross-entropy | seeds | parameters (active) '
    '| steps | minutes |',
    '|---|---:|---:|---:|---:|---:|',
  ]
  names = {'recipe': 'Tiny Shakespeare'}
  names |= {f'{text}-recipe': what for text, what in texts.TEXTS.items()}
  for name, what in names.items():
    runs = seeds_of(figures, name)
    if runs:
      result = runs[0]['result']
      minutes = statistics.median(map(config_runs.minutes, runs))
      lines.append(
        f'| {what} | {tell(map(config_runs.loss, runs))} | {len(runs)} '
        f'| {result["num_params"]:,} ({result["num_active_params"]:,}) '
        f'| {result["step"]} | {minutes:.1f} |'
      )
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def pairs(figures: dict[str, Any]) -> str:
  """Markdown: experts and dense layers, text by text."""
  lines = [
    '| text | experts | dense | difference | seeds | disjoint ranges '
    '| steps: experts, dense | minutes: experts, dense |',
    '|---|---:|---:|---:|---:|---|---:|---:|',
  ]
  for names, what in PAIRS.items():
    both = [seeds_of(figures, name) for name in names]
    if not all(both):
      continue
    losses = [[*map(config_runs.loss, runs)] for runs in both]
    more = statistics.fmean(losses[0]) - statistics.fmean(losses[1])
    first, last = sorted(losses, key=statistics.fmean)
    apart = 'yes' if max(first) < min(last) else 'no'
    seeds = [*map(len, losses)]
    steps = [str(runs[0]['result']['step']) for runs in both]
    minutes = [
      f'{statistics.median(map(config_runs.minutes, runs)):.1f}'
      for runs in both
    ]
    lines.append(
      f'| {what} | {" | ".join(map(tell, losses))} | {more:+.4f} '
      f'| {", ".join(map(str, seeds))} | {apart if min(seeds) > 1 else ""} '
      f'| {", ".join(steps)} | {", ".join(minutes)} |'
    )
  return '\n'.join(lines)


def seeds_of(figures: dict[str, Any], variant: str) -> list[dict[str, Any]]:
  """Figures of the runs named VARIANT or VARIANT-SEED."""
  return [
    run
    for name, run in figures['runs'].items()
    if variant in (name, name.rpartition('-')[0])
  ]


if __name__ == '__main__':
  texts.write()
  sweep.main('recipe', RUNS, table, __doc__)
