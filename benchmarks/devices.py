"""python -m benchmarks.devices

Seconds of a training step of base.py on one CPU device and on two, which share
two cores: with the batch, the parameters or the matrices divided. In turn, in
one process. Writes benchmarks/results/devices.json.
"""

from typing import Any

from absl import flags
import jax

from benchmarks import parity, peers, results
from benchmarks.step_time import seconds
from benchmarks.variant import Variant
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_integer(
  'steps', 20, 'Timed steps of each.', lower_bound=2, flag_values=_FLAGS
)
MESHES = {
  'one device': {},
  'data 2': {'mesh.data': '2'},
  'fsdp 2': {'mesh.fsdp': '2'},
  'tensor 2': {'mesh.tensor': '2'},
}


def measure(num_steps: int) -> list[dict[str, Any]]:
  """Returns the figures of a step on each mesh."""
  variants = {name: Variant(changes) for name, changes in MESHES.items()}
  taken: dict[str, list[float]] = {name: [] for name in MESHES}
  for i in range(num_steps + 2):
    for name, variant in variants.items():
      took = variant()
      if i >= 2:
        taken[name].append(took)
  rows = []
  for name, variant in variants.items():
    lowered = variant.jitted.lower(variant.state, variant.batch, variant.key)
    moved = parity.collectives(lowered.compile().as_text())
    num_bytes = sum(entry['bytes'] for entry in moved.values())
    row = {'mesh': name, 'bytes': num_bytes, **peers.summary(taken[name])}
    rows.append(row)
  return rows


def table(figures: dict[str, Any]) -> str:
  """Returns Markdown: a row for each mesh."""
  base = figures['rows'][0]['median_sec']
  lines = [
    '| mesh | s per step: median (quartiles) | relative | MB of collectives |',
    '|---|---:|---:|---:|',
    *(
      f'| {row["mesh"]} | {seconds(row)} | {row["median_sec"] / base:.2f} '
      f'| {row["bytes"] / 1e6:.1f} |'
      for row in figures['rows']
    ),
  ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def main(_: None) -> int:
  results.write('devices', {'rows': measure(_STEPS.value)})
  print(table(results.read('devices') or {}))
  return 0


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', 2)
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__ or ''))
