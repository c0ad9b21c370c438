"""python -m benchmarks.time_to_loss --against=nano-moe-jax

Seconds from the command to a validation cross-entropy of 1.618, which is what
nano-moe-jax's recipe comes to in 5000 steps. Ours: configs/shakespeare.py with
as many steps as that takes, its schedule the shorter, without dropout, as it
reads the text once; as a process, evaluated on the whole split. Theirs: its
steps and its evaluations, at what each costs here, in turn with base.py's,
which benchmarks/curves.py draws by. Writes
benchmarks/results/time_to_loss-PEER.json.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks import peers, results
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_AGAINST = flags.DEFINE_enum(
  'against', 'nano-moe-jax', ['nano-moe-jax'], 'A peer.', flag_values=_FLAGS
)
_STEPS = flags.DEFINE_integer(
  'steps', 450, 'Of ours.', lower_bound=100, flag_values=_FLAGS
)

TARGET = 1.618  # Nats a character.
# Of nano-moe-jax: an evaluation at step 1 and at every 250th.
PEER_STEPS, PEER_EVALUATIONS, PEER_BATCHES = 5000, 21, 200


def ours(directory: str, num_steps: int) -> dict[str, Any]:
  """Seconds from the command until the target is in metrics.jsonl."""
  workdir = pathlib.Path(directory) / 'run'
  begin = time.perf_counter()
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'nanomoe.main', '-q'),
      '--config=configs/shakespeare.py',
      f'--workdir={workdir}',
      f'--config.num_train_steps={num_steps}',
      f'--config.eval_interval={num_steps // 2}',
      '--config.model.dropout_rate=0',
      '--config.sample.num_tokens=0',
    ],
    cwd=peers.ROOT,
    env=peers.environment(ours=True),
  )
  curve: list[dict[str, float]] = []
  while process.poll() is None:
    time.sleep(0.1)
    seconds = time.perf_counter() - begin
    for step, loss in _evaluations(workdir)[len(curve) :]:
      curve.append({'step': step, 'loss': loss, 'sec': seconds})
  if process.returncode:
    raise SystemExit(f'nanomoe.main ended with {process.returncode}')
  reached = [point['sec'] for point in curve if point['loss'] <= TARGET]
  return {'curve': curve, 'sec': reached[0] if reached else None}


def _evaluations(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """(step, loss), of the lines that are whole."""
  path = workdir / 'metrics.jsonl'
  text = path.read_text() if path.exists() else ''
  rows = [json.loads(x) for x in text.splitlines(True) if x.endswith('\n')]
  key = 'val/cross_entropy'
  return [(r['step'], r[key]) for r in rows if key in r and r['step']]


def costs(peer: str) -> dict[str, dict[str, Any]]:
  """Of base.py, and of the peer: medians, and the whole recipe at these."""
  with peers.Worker('ours') as ours, peers.Worker(peer) as theirs:
    workers = {'base': ours, 'theirs': theirs}
    found = {
      what: peers.interleave(workers, what, blocks=4, n=3)
      for what in ('step', 'evaluation')
    }
  each = {name: {what: found[what][name] for what in found} for name in workers}
  for cost in each.values():
    step, batch = (cost[k]['median_sec'] for k in ('step', 'evaluation'))
    evaluations = PEER_EVALUATIONS * PEER_BATCHES * batch
    cost['sec'] = PEER_STEPS * step + evaluations
  return each


def table(figures: dict[str, Any]) -> str:
  """Markdown."""
  mine, peer = figures['ours'], figures['theirs']
  lines = [
    '| trainer | s to a validation cross-entropy of 1.618 | steps |',
    '|---|---:|---:|',
  ]
  if mine['sec'] is None:
    lowest = min(point['loss'] for point in mine['curve'])
    lines.append(
      f'| `configs/shakespeare.py` | not reached: {lowest:.4f} '
      f'| {figures["steps"]} |'
    )
  else:
    lines += [
      f'| `configs/shakespeare.py` | {mine["sec"]:.0f} | {figures["steps"]} |',
      f'| {figures["against"]} | {peer["sec"]:.0f} | {PEER_STEPS} |',
      f'| ratio | {peer["sec"] / mine["sec"]:.1f} | |',
    ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def main(_: None) -> int:
  with tempfile.TemporaryDirectory() as directory:
    figures = {
      'against': _AGAINST.value,
      'steps': _STEPS.value,
      'ours': ours(directory, _STEPS.value),
      **costs(_AGAINST.value),
    }
  name = f'time_to_loss-{_AGAINST.value}'
  results.write(name, figures)
  print(table(results.read(name) or {}))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
