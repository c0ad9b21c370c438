"""python -m benchmarks.collapse

Provokes a collapse of routing, and lets callbacks.routing_alarm only tell of
it, raise the balance loss's weight, or stop the run. A small model on an
artificial text, each run a minute or less; needs no network. Writes
benchmarks/results/collapse.json, which `benchmarks.report` makes a table of.
"""

import json
import pathlib
import tempfile
from typing import Any

from absl import flags
import numpy as np

from benchmarks import results
from configs import base
from nanomoe.config import overrides as config_lib
from nanomoe.run import cli, terminal

_FLAGS = flags.FlagValues()
ACTIONS = ('warn', 'raise', 'stop')
NUM_SYMBOLS = 8
KEPT_STEPS = 50  # From one log that is kept to the next.

# One expert a token, weighted by its probability: who is chosen learns, and is
# chosen more. Nothing balances, routers are paid for certainty, and steps are
# ten times as large as base.py's.
PROVOKED = {
  'num_train_steps': 800,
  'batch_size': 16,
  'block_size': 32,
  'eval_interval': 250,
  'eval_iters': 8,
  'log_interval': 10,
  'model.d_model': 32,
  'model.num_layers': 2,
  'model.num_heads': 2,
  'model.dropout_rate': 0.0,
  'moe.num_experts': 8,
  'moe.top_k': 1,
  'moe.d_ff': 64,
  'moe.router.type': 'Softmax',
  'moe.aux_weight': 0.0,
  'moe.entropy_weight': 0.05,
  'optimizer.learning_rate': 3e-3,
  'sample.num_tokens': 0,
  'callbacks.routing_alarm.dead_steps': 50,
}


def text(length: int = 200_000) -> str:
  """Letters whose law is given by the two before them."""
  rng = np.random.default_rng(0)
  law = rng.dirichlet(np.full(NUM_SYMBOLS, 0.4), (NUM_SYMBOLS, NUM_SYMBOLS))
  cumulative, uniform = law.cumsum(axis=-1), rng.random(length)
  symbols = np.zeros(length, int)
  for t in range(2, length):
    row = cumulative[symbols[t - 2], symbols[t - 1]]
    symbols[t] = min(np.searchsorted(row, uniform[t]), NUM_SYMBOLS - 1)
  return ''.join(chr(ord('a') + s) for s in symbols)


def run(
  action: str, directory: pathlib.Path, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
  """What became of a provoked run: its result, its last log, its alarms."""
  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)

  directory.mkdir(parents=True)
  source = directory / 'source.txt'
  source.write_text(text())
  values = {
    **PROVOKED,
    'data.path': source,
    'callbacks.routing_alarm.action': action,
    **(changes or {}),
  }
  config = config_lib.apply(
    base.get_config(), [(k, str(v)) for k, v in values.items()]
  )
  trainer = experiment.build(config, directory)
  status = trainer.fit()
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  logs = [x for x in map(json.loads, lines) if 'train/loss' in x]
  alarmed = [log['step'] for log in logs if log['routing_alarms']]
  quiet = [log['step'] for log in logs if log['step'] > max(alarmed)]
  kept = ('load_entropy', 'max_vio', 'dead_experts', 'aux_weight')
  return {
    'status': status,
    'stop_reason': trainer.stop_reason,
    'step': trainer.step,
    'best_val_loss': trainer.best and trainer.best.value,
    'first_alarm': alarmed[0],
    'quiet_from': quiet[0] if quiet else None,
    'most_dead': max(np.mean(log['train/dead_experts']) for log in logs),
    'logs': [
      {
        'step': log['step'],
        'alarms': log['routing_alarms'],
        **{name: np.round(log[f'train/{name}'], 4).tolist() for name in kept},
      }
      for log in logs
      if log['step'] % KEPT_STEPS == 0 or log is logs[-1]
    ],
  }


def table(figures: dict[str, Any]) -> str:
  """Markdown: a row for each action."""
  lines = [
    '| `action` | first alarm at step | no alarm from step | most dead experts '
    '| last step, status | dead at the end | load entropy by layer, nats '
    '| MaxVio by layer | weight | best val cross-entropy |',
    '|---|---:|---:|---:|---|---:|---|---|---:|---:|',
  ]
  for action, found in figures['runs'].items():
    last, best = found['logs'][-1], found['best_val_loss']
    entropy, vio = (
      ' '.join(f'{x:.2f}' for x in last[name])
      for name in ('load_entropy', 'max_vio')
    )
    lines.append(
      f'| `{action}` | {found["first_alarm"]} '
      f'| {found["quiet_from"] or "never"} | {found["most_dead"]:.0%} '
      f'| {found["step"]}, {found["status"]} '
      f'| {np.mean(last["dead_experts"]):.0%} | {entropy} | {vio} '
      f'| {last["aux_weight"]:.3g} '
      f'| {"not evaluated" if best is None else f"{best:.4f}"} |'
    )
  reason = figures['runs']['stop']['stop_reason']
  even = f'{np.log(PROVOKED["moe.num_experts"]):.2f}'
  return '\n'.join(
    [
      *lines,
      '',
      f'Balanced loads have an entropy of {even} nats. The run with `stop` '
      f'gave the reason "{reason}".',
    ]
  )


def main(_: None) -> int:
  terminal.log_to_terminal(quiet=True)
  with tempfile.TemporaryDirectory() as directory:
    runs = {a: run(a, pathlib.Path(directory) / a) for a in ACTIONS}
  figures = {'runs': runs}
  results.write('collapse', figures)
  print(table(figures))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
