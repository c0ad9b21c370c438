"""python -m benchmarks.recipe --workdir=DIR [--table]

configs/shakespeare.py on three seeds, and on other texts; the same without
experts, for as many minutes. The same of what the recipe was before, whose
parts were taken out one at a time. benchmarks/sweep.py says how it goes on;
`python -m benchmarks.report` puts the tables into docs/recipe.md.
"""

import math
import statistics
from typing import Any

from benchmarks import config_runs, results, sweep, texts
from benchmarks.routing_study import tell
from benchmarks.sweep import Run

CONFIG = 'configs/shakespeare.py'
SEEDS = (0, 1, 2)

DENSE = {'moe.first_dense_layers': 4}  # As many parameters for a token.
MORE = {'model.dropout_rate': 0.15}  # Where experts are ahead.
# What the recipe was before; docs/recipe.md says why it is not.
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
  'more': MORE,
  'more_dense': {**MORE, **DENSE, 'num_train_steps': 3800},
  'earlier': EARLIER,
  'earlier_dense': {**EARLIER, **DENSE, 'num_train_steps': 2650},
  'plain': PLAIN,
  'plain_dense': {**PLAIN, **DENSE, 'num_train_steps': 2650},
  'half': {**PLAIN, 'num_train_steps': 1200},
  'half_dense': {**PLAIN, **DENSE, 'num_train_steps': 1350},
}

# {name: (what is taken out, changes)}.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  'nothing': ('nothing', {}),
  'convolution': ('convolutions', {'model.conv_width': 1}),
  'muon': (
    'Muon, for AdamW at 0.003',
    {'optimizer.type': 'AdamW', 'optimizer.learning_rate': 3e-3},
  ),
  'minutes': (
    'experts, for dense layers and as many minutes',
    {**DENSE, 'num_train_steps': 690},
  ),
  'zeros': ('outputs that start at zero', {'model.zero_outputs': 'false'}),
  'context': (
    'half of the context, for twice as many windows',
    {'block_size': 128, 'batch_size': 16},
  ),
  'qk_norm': ('normalized queries and keys', {'model.qk_norm': 'false'}),
  'norm': ('RMSNorm, for LayerNorm', {'model.norm': 'LayerNorm'}),
  'rope': ('RoPE, for learned positions', {'model.position': 'learned'}),
  'width': (
    'two of four experts, for four of eight of half the width',
    {'moe.num_experts': 8, 'moe.top_k': 4, 'moe.d_ff': 256},
  ),
}
# Those that are trained on more than the first seed.
TELLING = ('nothing', 'minutes', 'convolution', 'muon', 'zeros', 'context')
SHORT = {**PLAIN, 'num_train_steps': 600, 'eval_interval': 200}

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
ABLATION = {
  f'short-{name}-{seed}': Run(CONFIG, {**SHORT, **changes}, seed)
  for seed in SEEDS
  for name, (_, changes) in VARIANTS.items()
  if seed == SEEDS[0] or name in TELLING
}
RUNS = {**RECIPE, **OTHER_TEXTS, **ABLATION}

# {(with experts, dense): which text, and how much of the recipe}.
PAIRS = {
  ('recipe', 'dense'): 'Tiny Shakespeare',
  ('more', 'more_dense'): 'the same, a dropout of 0.15',
  ('earlier', 'earlier_dense'): 'Tiny Shakespeare, the recipe before',
  ('plain', 'plain_dense'): 'the same, without the penalty',
  ('half', 'half_dense'): 'the same, half of the steps',
  ('short-nothing', 'short-minutes'): 'the same, a quarter of the steps',
  **{
    (f'{text}-{experts}', f'{text}-{dense}'): f'{what}{which}'
    for text, what in texts.TEXTS.items()
    for experts, dense, which in (
      ('recipe', 'dense', ''),
      ('plain', 'plain_dense', ', the recipe before without the penalty'),
    )
  },
}


def table(figures: dict[str, Any]) -> str:
  """Markdown: all of it."""
  return '\n\n'.join(make(figures) for make in (whole, pairs, ablation))


def whole(figures: dict[str, Any]) -> str:
  """Markdown: the recipe, unchanged, text by text."""
  lines = [
    f'| `{CONFIG}` on | val cross-entropy | seeds | parameters (for a token) '
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
    '| text | with experts | dense | difference | seeds | ranges apart '
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


def ablation(figures: dict[str, Any]) -> str:
  """Markdown: what each thing is worth, most first."""
  found = {
    name.removeprefix('short-'): runs
    for name, runs in sweep.by_variant(figures, ABLATION).items()
  }
  if not found:
    return ''
  # Of the same seeds.
  whole = {r['seed']: config_runs.loss(r) for r in found.get('nothing', ())}
  more = {
    name: statistics.fmean(
      config_runs.loss(r) - whole.get(r['seed'], math.nan) for r in runs
    )
    for name, runs in found.items()
  }
  lines = [
    '| without | val cross-entropy | more than with all '
    '| parameters (for a token) | s a step |',
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
  return '\n'.join(lines)


if __name__ == '__main__':
  texts.write()
  sweep.main('recipe', RUNS, table, str(__doc__))
