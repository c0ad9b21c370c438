"""Where figures are kept, and on what machine they were measured."""

import json
import os
import pathlib
import platform
from typing import Any

import jax

DIRECTORY = pathlib.Path(__file__).parent / 'results'


def write(name: str, figures: dict[str, Any]) -> None:
  """results/<name>.json: the figures and the machine."""
  DIRECTORY.mkdir(exist_ok=True)
  text = json.dumps({'machine': machine(), **figures}, indent=1)
  (DIRECTORY / f'{name}.json').write_text(text + '\n')


def read(name: str) -> dict[str, Any] | None:
  path = DIRECTORY / f'{name}.json'
  return json.loads(path.read_text()) if path.exists() else None


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
