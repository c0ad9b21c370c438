"""Provenance of a run: versions, devices, command and revision."""

from importlib import metadata
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

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


def facts() -> dict[str, Any]:
  """JSON: versions, devices, argv, revision."""
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
  """The commit of this source tree, '+' if it was changed; None outside git.

  None too where git knows the directory, as another project's, but not us.
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
