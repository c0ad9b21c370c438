"""python -m benchmarks.scaling

Seconds of a training step as one layer's experts grow in number and shrink in
width: 4 of 512 to 64 of 32 hidden units, two for each token. The parameters
stay, the chosen experts' products shrink; what grows is the cost of sparsity.
In turn, in one process. Writes benchmarks/results/scaling.json.
"""

from typing import Any

from absl import flags

from benchmarks import peers, results
from benchmarks.step_time import seconds
from benchmarks.variant import Variant
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_integer(
  'steps', 20, 'Timed steps of each.', lower_bound=2, flag_values=_FLAGS
)
TOTAL_WIDTH = 2048
NUM_EXPERTS = (4, 8, 16, 32, 64)


def measure() -> dict[str, Any]:
  variants = {
    n: Variant({'moe.num_experts': str(n), 'moe.d_ff': str(TOTAL_WIDTH // n)})
    for n in NUM_EXPERTS
  }
  taken: dict[int, list[float]] = {n: [] for n in variants}
  for i in range(_STEPS.value + 2):
    for n, variant in variants.items():
      took = variant()
      if i >= 2:
        taken[n].append(took)
  return {
    str(n): {**peers.summary(values), 'gflop': variants[n].flops() / 1e9}
    for n, values in taken.items()
  }


def table(figures: dict[str, Any]) -> str:
  """Markdown."""
  steps = figures['step']
  base = steps[str(NUM_EXPERTS[0])]['median_sec']
  lines = [
    '| experts | width of each | s per step: median (quartiles) '
    '| relative to 4 | GFLOP of products |',
    '|---:|---:|---:|---:|---:|',
  ]
  lines += [
    f'| {n} | {TOTAL_WIDTH // int(n)} | {seconds(row)} '
    f'| {row["median_sec"] / base:.2f} | {row["gflop"]:.1f} |'
    for n, row in steps.items()
  ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def main(_: None) -> int:
  results.write('scaling', {'step': measure()})
  print(table(results.read('scaling') or {}))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
