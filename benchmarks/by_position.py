"""python -m benchmarks.by_position --workdir=DIR

What earlier characters are worth: the validation cross-entropy of each eighth
of a window, of runs that benchmarks/recipe.py left in DIR. A model that copies
what it has read in the window gains to its end; one that does not, little
beyond the first eighth. Writes benchmarks/results/by_position.json.
"""

import pathlib
import sys
from typing import Any

from absl import flags
import jax
import numpy as np

from benchmarks import results
from nanomoe import experiment
from nanomoe.config import home
from nanomoe.data import pipeline as text_lib
from nanomoe.ops.cross_entropy import cross_entropy
from nanomoe.run import cli, terminal
from nanomoe.run import workdir as workdir_lib

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the study.', required=True, flag_values=_FLAGS
)

PARTS = 8
# {name of a run: what it is}.
RUNS = {
  'plain-0': 'Tiny Shakespeare, experts',
  'plain_dense-0': 'Tiny Shakespeare, dense',
  'python-plain': 'Python, experts',
  'python-plain-1': 'Python, experts, seed 1',
  'python-plain_dense': 'Python, dense',
  'python-plain_dense-1': 'Python, dense, seed 1',
  'addresses-plain': 'Addresses, experts',
  'addresses-plain_dense': 'Addresses, dense',
}


def measure(workdir: pathlib.Path) -> list[float]:
  """Nats by part of the window, over all whole windows of the split."""
  config = workdir_lib.config_of(workdir)
  config.eval_iters = 0
  run = experiment.restore(config, workdir, 'best')
  _, _, dataset = text_lib.read(config, workdir)
  trained = jax.device_put((run.params, run.model_state))

  @jax.jit
  def nats(trained, inputs, targets):
    return cross_entropy(run.task.logits(trained, inputs)[0], targets)

  rows = []
  for batch in dataset.eval_batches('val', slice(0, config.batch_size)):
    whole = batch['weights'].all(axis=1)
    each = nats(trained, batch['inputs'], batch['targets'])
    rows.append(np.asarray(each)[whole])
  by_position = np.concatenate(rows).mean(axis=0)
  return [float(part.mean()) for part in np.array_split(by_position, PARTS)]


def table(figures: dict[str, Any]) -> str:
  """Markdown."""
  lines = [
    f'| run | {" | ".join(f"{i} / {PARTS}" for i in range(1, PARTS + 1))} |',
    f'|---|{"---:|" * PARTS}',
    *(
      f'| {RUNS[name]} | {" | ".join(f"{x:.3f}" for x in parts)} |'
      for name, parts in figures['runs'].items()
    ),
  ]
  return '\n'.join(lines)


def main(_: None) -> int:
  terminal.log_to_terminal(sys.stderr)
  root = pathlib.Path(home.expand(_WORKDIR.value, '--workdir'))
  found = [name for name in RUNS if (root / name / 'result.json').exists()]
  results.write(
    'by_position', {'runs': {name: measure(root / name) for name in found}}
  )
  print(table(results.read('by_position') or {}))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
