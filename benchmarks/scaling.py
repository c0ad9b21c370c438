"""python -m benchmarks.scaling

Seconds of a training step as the experts of each layer grow in number and
shrink in width, along two axes. `experts`: 4 of 512 to 64 of 32 hidden units,
two for each token. The parameters stay, and the products of the chosen experts
shrink. `grain`: 4 experts of 512 with one for each token, to 128 of 16 with 32
for each token. Both the parameters and the products stay, so the growth is the
cost of finer experts. In turn, in one process. Writes
benchmarks/results/scaling.json.
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
# Experts and experts of a token, by axis.
AXES = {
  'experts': ((4, 2), (8, 2), (16, 2), (32, 2), (64, 2)),
  'grain': ((4, 1), (8, 2), (16, 4), (32, 8), (64, 16), (128, 32)),
}


def measure(sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
  """Returns the figures of a step for each number of experts."""
  variants = [
    Variant(
      {
        'moe.num_experts': str(num_experts),
        'moe.top_k': str(top_k),
        'moe.d_ff': str(TOTAL_WIDTH // num_experts),
      }
    )
    for num_experts, top_k in sizes
  ]
  taken: list[list[float]] = [[] for _ in variants]
  for i in range(_STEPS.value + 2):
    for variant, seconds_of in zip(variants, taken, strict=True):
      took = variant()
      if i >= 2:
        seconds_of.append(took)
  return [
    {
      'num_experts': num_experts,
      'top_k': top_k,
      **peers.summary(values),
      'gflop': variant.flops() / 1e9,
    }
    for (num_experts, top_k), variant, values in zip(
      sizes, variants, taken, strict=True
    )
  ]


def table(figures: dict[str, Any]) -> str:
  """Returns the figures as tables in Markdown, one for each axis."""
  lines = []
  for axis in AXES:
    rows = figures[axis]
    base = rows[0]['median_sec']
    lines += [
      '| experts | experts of a token | width of each '
      '| s per step: median (quartiles) | relative | GFLOP of products |',
      '|---:|---:|---:|---:|---:|---:|',
    ]
    lines += [
      f'| {row["num_experts"]} | {row["top_k"]} '
      f'| {TOTAL_WIDTH // row["num_experts"]} | {seconds(row)} '
      f'| {row["median_sec"] / base:.2f} | {row["gflop"]:.1f} |'
      for row in rows
    ]
    lines.append('')
  return '\n'.join([*lines, results.describe(figures['machine'])])


def main(_: None) -> int:
  results.write('scaling', {k: measure(v) for k, v in AXES.items()})
  print(table(results.read('scaling') or {}))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
