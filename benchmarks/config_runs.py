"""python -m benchmarks.config_runs --workdir=DIR [--table]

Trains short.py and every config that differs from it, as their files say.
benchmarks/sweep.py says how it goes on; `python -m benchmarks.report` then puts
time and loss at the top of each file and into docs/results.md.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks import sweep
from benchmarks.sweep import Run

CONFIGS = (
  'short',
  'dense',
  'switch',
  'mixtral_nano',
  'qwen3_nano',
  'deepseek_nano',
  'expert_choice',
)

RUNS = {name: Run(f'configs/{name}.py') for name in CONFIGS}

HEAD = [
  '| config | parameters (active) | steps | val cross-entropy '
  '| minutes | s per step |',
  '|---|---:|---:|---:|---:|---:|',
]


def table(figures: dict[str, Any]) -> str:
  """Markdown."""
  rows = [row(run['config'], run) for run in figures['runs'].values()]
  return '\n'.join([*HEAD, *rows])


def row(command: str, run: dict[str, Any]) -> str:
  result = run['result']
  return (
    f'| `{command}` | {result["num_params"]:,} '
    f'({result["num_active_params"]:,}) | {result["step"]} '
    f'| {loss(run):.4f}{"" if run.get("is_causal", True) else "*"} '
    f'| {minutes(run):.0f} | {1 / result["steps_per_sec"]:.3f} |'
  )


def loss(run: dict[str, Any]) -> float:
  """Of the best step, over the whole validation split."""
  if 'exact' in run:  # Its evaluations were of samples.
    return run['exact']['cross_entropy']
  return run['result']['best_val_loss']


def minutes(run: Mapping[str, Any]) -> float:
  return sum(run['result']['seconds_by_phase'].values()) / 60


if __name__ == '__main__':
  sweep.main('config_runs', RUNS, table, __doc__)
