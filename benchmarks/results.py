"""Where figures are kept, and on what machine they were measured."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

DIRECTORY = pathlib.Path(__file__).parent / 'results'

# Of result.json, what figures have.
_KEPT = (
  'status',
  'step',
  'num_params',
  'num_active_params',
  'corpus',
  'vocab_size',
  'best_val_loss',
  'best_step',
  'train_seconds',
  'steps_per_sec',
  'tokens_per_sec',
  'seconds_by_phase',
  'peak_memory_bytes',
  'versions',
  'revision',
)


def write(
  name: str, figures: dict[str, Any], directory: pathlib.Path = DIRECTORY
) -> None:
  """Writes the figures and the machine to <directory>/<name>.json."""
  directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps({'machine': machine(), **figures}, indent=1)
  # A reader never finds half a file, even if the process is killed.
  part = directory / f'{name}.json.part'
  part.write_text(text + '\n')
  part.replace(directory / f'{name}.json')


def read(
  name: str, directory: pathlib.Path = DIRECTORY
) -> dict[str, Any] | None:
  """Returns the figures of <directory>/<name>.json; None if it is missing."""
  path = directory / f'{name}.json'
  return json.loads(path.read_text()) if path.exists() else None


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def of_run(workdir: pathlib.Path) -> dict[str, Any]:
  """A finished run's evaluations, all metrics of the last one, result, text."""
  logged = metrics(workdir)
  train = {m['step']: m for m in logged if 'train/loss' in m}
  evaluations = [
    m for m in logged if 'val/cross_entropy' in m and m['step'] >= min(train)
  ]
  rows = [
    {
      'step': m['step'],
      'train/cross_entropy': train[max(s for s in train if s <= m['step'])][
        'train/cross_entropy'
      ],
      'val/cross_entropy': m['val/cross_entropy'],
      'val/bits_per_char': m['val/bits_per_char'],
      **({'val/aux_loss': m['val/aux_loss']} if 'val/aux_loss' in m else {}),
    }
    for m in evaluations
  ]
  result = json.loads((workdir / 'result.json').read_text())
  sample = workdir / 'sample.txt'
  return {
    'rows': rows,
    'last': {k: v for k, v in evaluations[-1].items() if k[:4] == 'val/'},
    'result': {key: result[key] for key in _KEPT},
    'sample': sample.read_text() if sample.exists() else '',
  }


def machine() -> dict[str, Any]:
  """What a time depends on; the load is that of the last minute."""
  return {
    'cpu': _cpu('model name') or platform.processor(),
    'features': [
      flag
      for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16')
      if flag in _cpu('flags').split()
    ],
    'num_cpus': os.cpu_count(),
    'load': os.getloadavg()[0],
    'python': platform.python_version(),
    'jax': jax.__version__,
  }


def _cpu(key: str) -> str:
  """Of the first CPU, where Linux tells."""
  path = pathlib.Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  found = [x.partition(':')[2].strip() for x in lines if x.startswith(key)]
  return found[0] if found else ''


def describe(machine: dict[str, Any]) -> str:
  """One line for the foot of a table."""
  features = (
    f' ({", ".join(machine["features"])})' if machine['features'] else ''
  )
  return (
    f'{machine["cpu"]}{features}, {machine["num_cpus"]} cores, '
    f'jax {machine["jax"]}.'
  )
