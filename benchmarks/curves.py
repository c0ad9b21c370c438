"""python -m benchmarks.curves

Draws docs/recipe.png, validation loss against time, of benchmarks/results: on
Tiny Shakespeare the recipe, the same without experts, base.py and nano-moe-jax;
on a text that a run does not read twice, each seed of the recipe, with and
without experts. Needs `pip install -e '.[plot]'`.
"""

from collections.abc import Mapping
import importlib
import statistics
from typing import Any

from benchmarks import config_runs, recipe, results, time_to_loss
from benchmarks.peers import ROOT

Curve = list[tuple[float, float]]  # Minutes since the start, nats a character.


def curves() -> dict[str, Curve]:
  """Of what has been measured."""
  runs = (results.read('recipe') or {'runs': {}})['runs']
  base = results.read('base')
  race = results.read('time_to_loss-nano-moe-jax')
  found = {
    'shakespeare.py': runs.get('recipe-0'),
    'shakespeare.py, dense': runs.get('dense-0'),
  }
  drawn = {
    name: of_run(run, config_runs.minutes(run))
    for name, run in found.items()
    if run
  }
  if base and race:
    drawn['base.py'] = at_cost(base, race['base'])
    drawn['nano-moe-jax'] = at_cost(base, race['theirs'])
  return drawn


def seeds(name: str) -> list[Curve]:
  """Runs of benchmarks/recipe.py, each at the minutes of their median."""
  runs = recipe.seeds_of(results.read('recipe') or {'runs': {}}, name)
  minutes = statistics.median(map(config_runs.minutes, runs)) if runs else 0.0
  return [of_run(run, minutes) for run in runs]


def of_run(run: Mapping[str, Any], minutes: float) -> Curve:
  """Its evaluations, as evenly spread over the minutes as over its steps."""
  each = minutes / run['result']['step']
  return [(r['step'] * each, r['val/cross_entropy']) for r in run['rows']]


def at_cost(base: Mapping[str, Any], costs: Mapping[str, Any]) -> Curve:
  """base.py's losses, which are nano-moe-jax's too, at a measured cost."""
  step, batch = (costs[k]['median_sec'] for k in ('step', 'evaluation'))
  evaluation = time_to_loss.PEER_BATCHES * batch
  return [
    ((r['step'] * step + (i + 2) * evaluation) / 60, r['val/cross_entropy'])
    for i, r in enumerate(base['rows'])  # One more was at its first step.
  ]


def main() -> None:
  pyplot = importlib.import_module('matplotlib.pyplot')
  figure, (race, texts) = pyplot.subplots(
    1, 2, figsize=(11, 4), layout='constrained'
  )
  for name, curve in curves().items():
    race.plot(*zip(*curve, strict=True), marker='.', label=name)
  race.axhline(time_to_loss.TARGET, color='gray', linewidth=0.8, linestyle=':')
  race.set(
    title='Tiny Shakespeare',
    xscale='log',
    xlabel='minutes on 2 cores',
    ylabel='validation cross-entropy, nats a character',
    ylim=(1.4, 2.3),
  )
  for color, name, label in (
    ('C0', 'plain', 'the recipe before, without the penalty'),
    ('C1', 'plain_dense', 'the same, dense'),
  ):
    for curve in seeds(f'addresses-{name}'):
      points = zip(*curve, strict=True)
      texts.plot(*points, color=color, marker='.', label=label)
      label = ''  # One line of the legend for all seeds.
  texts.set(title='State of the Union addresses', xlabel='minutes on 2 cores')
  for axes in (race, texts):
    axes.legend(frameon=False)
  figure.savefig(ROOT / 'docs' / 'recipe.png', dpi=120)


if __name__ == '__main__':
  main()
