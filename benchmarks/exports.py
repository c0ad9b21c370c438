"""python -m benchmarks.exports --workdir=DIR [--table]

Exports of short runs of every class of transformers, compared with that library
by the command itself, and the time and the peak memory of exports. Biases of
routers move so quickly that they select experts. benchmarks/sweep.py says how
an interrupted study resumes; `python -m benchmarks.report` puts the tables into
docs/guides/transformers.md.
"""

import configparser
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import peers, results, sweep
from benchmarks.sweep import Run
from tests import exported
from trainers.checkpoint import reader

_SHORT = {
  'num_train_steps': 200,
  'eval_interval': 200,
  'eval_iters': 2,
  'checkpoint.keep_latest': 1,
  'sample.num_tokens': 0,
}
_FAST_BIAS = {'moe.router.bias_rate': 0.02}
_TINY = {**exported.COMMON, 'block_size': 64, 'optimizer.learning_rate': 3e-3}
# Enough parameters that arrays outweigh the libraries.
_LARGE = {
  'num_train_steps': 1,
  'eval_interval': 1,
  'eval_iters': 1,
  'batch_size': 1,
  'model.d_model': 512,
  'model.num_layers': 8,
  'moe.d_ff': 1024,
  'checkpoint.keep_latest': 1,
  'sample.num_tokens': 0,
}
LARGE = 'large'
# Size of the files of `large`: 4 of them.
SHARD_BYTES = 10**8


def _case(name: str) -> dict[str, Any]:
  changes = exported.CASES[name]
  is_balanced = changes.get('moe.router.bias_rate') == 0
  has_bias = changes.get('moe.router.type') == 'Sigmoid' and not is_balanced
  return changes | (_FAST_BIAS if has_bias else {})


CONFIGS = ('mixtral_nano', 'qwen3_nano', 'deepseek_nano')
RUNS = {
  **{
    name: Run(
      f'configs/{name}.py',
      _SHORT | (_FAST_BIAS if name == 'deepseek_nano' else {}),
    )
    for name in CONFIGS
  },
  **{
    name: Run('configs/base.py', {**_SHORT, **_TINY, **_case(name)})
    for name in exported.CASES
  },
  LARGE: Run('configs/mixtral_nano.py', _LARGE),
}


def _python() -> pathlib.Path:
  """Returns the interpreter of an environment with torch and transformers."""
  requirements, _ = peers.PEERS['transformers']
  options = configparser.ConfigParser()
  options.read(peers.ROOT / 'setup.cfg')
  ours = options['options']['install_requires'].split('\n')[1:]
  return peers.python_with('transformers-jax', [*requirements, *ours])


def _export(
  python: str | pathlib.Path, workdir: pathlib.Path, *words: str
) -> Any:
  """Returns what an export prints, its seconds and its peak of memory.

  Args:
    python: Interpreter, with or without transformers.
    workdir: Directory of the run.
    words: Module of the command, and further flags.
  """
  with tempfile.TemporaryDirectory() as directory:
    out = pathlib.Path(directory) / 'out'
    start = time.perf_counter()
    process = subprocess.Popen(
      [python, '-m', *words, f'--workdir={workdir}', f'--out={out}'],
      cwd=peers.ROOT,
      env=peers.environment(ours=True),
      stdout=subprocess.PIPE,
      text=True,
    )
    assert process.stdout
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
      raise SystemExit(f'the export of {workdir.name} failed')
    return {
      **json.loads(printed),
      'out': workdir.name,
      'sec': time.perf_counter() - start,
      'peak_bytes': usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024),
      'num_files': len(list(out.glob('*.safetensors'))),
    }


def measure(directory: pathlib.Path) -> dict[str, Any]:
  """Returns the comparisons of all runs, and the costs of large exports."""
  python, found = _python(), {}
  for name in RUNS:
    if name != LARGE:
      found[name] = _export(
        python, directory / name, 'nanomoe.export', '--verify=transformers'
      )
      found[name]['max_bias'] = _max_bias(directory / name)
  workdir = directory / LARGE
  checkpoint = sum(
    path.stat().st_size
    for path in (workdir / 'checkpoints').rglob('*')
    if path.is_file()
  )
  costs = {
    'alone': _export(sys.executable, workdir, 'nanomoe.export'),
    'sharded': _export(
      sys.executable, workdir, 'benchmarks.workers.export_sharded'
    ),
    'transformers': _export(python, workdir, 'nanomoe.export'),
  }
  return {'exports': found, 'checkpoint_bytes': checkpoint, 'costs': costs}


def _max_bias(workdir: pathlib.Path) -> float:
  """Returns the largest magnitude of the selection biases; 0 without them."""
  arrays, _ = reader.read(workdir / 'checkpoints', 'best')
  bias = arrays.get('state.model_state.bias')
  return 0.0 if bias is None else float(np.abs(bias).max())


def agreement(figures: dict[str, Any]) -> str:
  """Returns Markdown: a row for each export."""
  lines = [
    '| model | class | options | largest bias | largest logit difference '
    '| equal greedy tokens | equal token ids |',
    '|---|---|---|---:|---:|---:|---:|',
  ]
  for name, row in figures['exports'].items():
    options = (
      f'`configs/{name}.py`' if name in CONFIGS else name.partition('-')[2]
    )
    cells = [
      name.partition('-')[0] if name not in CONFIGS else name,
      f'`{row["class"]}`',
      options,
      f'{row["max_bias"]:.2f}' if row['max_bias'] else '',
      f'{row["max_logit_difference"]:.1e}',
      str(row['greedy_tokens']),
      f'{row["equal_token_ids"]:,}',
    ]
    lines.append(f'| {" | ".join(cells)} |')
  version = next(iter(figures['exports'].values()))['transformers']
  machine = results.describe(figures['machine'])
  return '\n'.join([*lines, '', f'transformers {version}, {machine}'])


_COSTS = {
  'alone': 'one file',
  'sharded': 'several files',
  'transformers': 'one file, compared with transformers',
}


def costs(figures: dict[str, Any]) -> str:
  """Returns Markdown: time and peak memory of the exports of one model."""
  size = figures['checkpoint_bytes']
  lines = [
    '| export | files | s | peak memory, GB | peak / checkpoint |',
    '|---|---:|---:|---:|---:|',
  ]
  for name, what in _COSTS.items():
    row = figures['costs'][name]
    lines.append(
      f'| {what} | {row["num_files"]} | {row["sec"]:.0f} '
      f'| {row["peak_bytes"] / 1e9:.2f} | {row["peak_bytes"] / size:.2f} |'
    )
  num_params = figures['runs'][LARGE]['result']['num_params']
  return '\n'.join(
    [
      *lines,
      '',
      f'{num_params:,} parameters; the checkpoint, with the state of the '
      f'optimizer, has {size / 1e9:.2f} GB. '
      + results.describe(figures['machine']),
    ]
  )


def table(figures: dict[str, Any]) -> str:
  """Returns Markdown: both tables."""
  return f'{agreement(figures)}\n\n{costs(figures)}'


if __name__ == '__main__':
  sweep.main('exports', RUNS, table, __doc__, measure)
