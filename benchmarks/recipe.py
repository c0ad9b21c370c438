"""python -m benchmarks.recipe --workdir=DIR [--table]

configs/shakespeare.py on three seeds; with one thing taken out at a time, for
as many steps; and, unchanged, on other texts. benchmarks/sweep.py says how it
goes on; `python -m benchmarks.report` puts the tables into docs/recipe.md.
"""

import statistics
from typing import Any

from benchmarks import config_runs, results, sweep, texts
from benchmarks.routing_study import tell
from benchmarks.sweep import Run

CONFIG = 'configs/shakespeare.py'
SEEDS = (0, 1, 2)

# {name: (what is taken out, changes)}.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
  'recipe': ('nothing', {}),
  'convolution': ('convolutions', {'model.conv_width': 1}),
  'muon': (
    'Muon, for AdamW at 0.003',
    {'optimizer.type': 'AdamW', 'optimizer.learning_rate': 3e-3},
  ),
  'experts': (
    'experts, for dense layers with as many active parameters',
    {'moe.first_dense_layers': 4},
  ),
  'zeros': ('outputs that start at zero', {'model.zero_outputs': 'false'}),
  'context': (
    'half of the context, for twice as many windows',
    {'block_size': 128, 'batch_size': 16},
  ),
  'qk_norm': ('normalized queries and keys', {'model.qk_norm': 'false'}),
  'norm': ('RMSNorm, for LayerNorm', {'model.norm': 'LayerNorm'}),
  'rope': ('RoPE, for learned positions', {'model.position': 'learned'}),
  'bigrams': ('nothing, with embeddings of bigrams', {'model.max_ngram': 2}),
}
# Those that are trained on more than the first seed.
TELLING = ('recipe', 'convolution', 'muon', 'experts', 'zeros', 'context')

ABLATION = {
  f'{name}-{seed}': Run(CONFIG, changes, seed)
  for name, (_, changes) in VARIANTS.items()
  for seed in (SEEDS if name in TELLING else SEEDS[:1])
}
OTHER_TEXTS = {
  name: Run(CONFIG, {'data.path': texts.path(name)}) for name in texts.TEXTS
}
RUNS = {**ABLATION, **OTHER_TEXTS}


def table(figures: dict[str, Any]) -> str:
  """Markdown: the recipe, then what it is worth, most first."""
  of_variant: dict[str, list[dict[str, Any]]] = {}
  for name, run in figures['runs'].items():
    if name in ABLATION:
      of_variant.setdefault(name.rpartition('-')[0], []).append(run)
  mean = {
    name: statistics.fmean(map(config_runs.loss, runs))
    for name, runs in of_variant.items()
  }
  lines = [
    '| without | val cross-entropy | more than the recipe '
    '| parameters (for a token) | s a step |',
    '|---|---:|---:|---:|---:|',
  ]
  for name in sorted(mean, key=lambda name: (name != 'recipe', -mean[name])):
    runs = of_variant[name]
    more = mean[name] - mean.get('recipe', mean[name])
    result = runs[0]['result']
    seconds = statistics.median(1 / r['result']['steps_per_sec'] for r in runs)
    lines.append(
      f'| {VARIANTS[name][0]} | {tell(map(config_runs.loss, runs))} '
      f'| {f"{more:+.4f}" if name != "recipe" else ""} '
      f'| {result["num_params"]:,} ({result["num_active_params"]:,}) '
      f'| {seconds:.3f} |'
    )
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def other_texts(figures: dict[str, Any]) -> str:
  """Markdown."""
  lines = [
    '| text | distinct characters | val cross-entropy | bits per character |',
    '|---|---:|---:|---:|',
  ]
  for name, what in texts.TEXTS.items():
    if run := figures['runs'].get(name):
      best = min(run['rows'], key=lambda row: row['val/cross_entropy'])
      lines.append(
        f'| {what} | {run["result"]["vocab_size"]} '
        f'| {best["val/cross_entropy"]:.4f} | {best["val/bits_per_char"]:.4f} |'
      )
  return '\n'.join(lines)


if __name__ == '__main__':
  texts.write()
  sweep.main('recipe', RUNS, table, str(__doc__))
