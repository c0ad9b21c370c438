"""Provenance of a run: versions, devices, command, revision and model size."""

from importlib import metadata
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from nanomoe.config.schema import Config

_PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'clu',
  'orbax-checkpoint',
  'numpy',
  'nanomoe',
)


def count_params(params: Any, config: Config) -> dict[str, int]:
  """Returns the numbers of parameters and of active parameters per token.

  A token uses top_k experts of a layer and one row of each n-gram table.

  Args:
    params: Parameters of the model.
    config: Config of the run.

  Returns:
    `num_params` and `num_active_params`.
  """
  sizes = {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  total = sum(sizes.values())
  experts = sum(
    n for name, n in sizes.items() if '.moe.w_' in name or '.moe.b_' in name
  )
  idle = experts * (config.moe.num_experts - config.moe.top_k)
  idle //= config.moe.num_experts
  tables = [n for name, n in sizes.items() if name.startswith('ngrams.')]
  idle += sum(tables) - len(tables) * config.model.d_model
  return {'num_params': total, 'num_active_params': total - idle}


def facts() -> dict[str, Any]:
  """Returns versions, devices, argv and revision as a JSON object."""
  return {
    'versions': {
      'python': platform.python_version(),
      **{name: _version(name) for name in _PACKAGES},
    },
    'devices': [f'{d.device_kind} {d.id}' for d in jax.devices()],
    'argv': sys.argv,
    'revision': _revision(),
  }


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _revision() -> str | None:
  """Returns the commit of this source tree, with '+' after local changes.

  Returns None if git does not track this file, even if it is inside the
  repository of another project.
  """
  here = pathlib.Path(__file__).parent

  def git(*arguments: str) -> str:
    return subprocess.run(
      ['git', '-C', str(here), *arguments],
      capture_output=True,
      text=True,
      check=True,
      timeout=5,
    ).stdout.strip()

  try:
    git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None
