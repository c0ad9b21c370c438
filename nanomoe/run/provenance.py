"""Provenance of a run: versions, devices, command and revision."""

import contextlib
from importlib import metadata
import os
import pathlib
import platform
import re
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
  """Returns versions, devices, argv, environment and revision as JSON."""
  return {
    'versions': versions(),
    'devices': [f'{d.device_kind} {d.id}' for d in jax.devices()],
    'cpu': cpu(),
    'argv': sys.argv,
    'environment': _environment(),
    'revision': _revision(),
  }


def versions() -> dict[str, str | None]:
  """Returns the versions of Python and of the packages that a run uses."""
  return {
    'python': platform.python_version(),
    **{name: _version(name) for name in _PACKAGES},
  }


def cpu() -> str:
  """Returns the model of this machine's CPU and the usable number of cores."""
  name = platform.processor()
  with contextlib.suppress(OSError):
    text = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
    found = re.search(r'^model name\s*:\s*(.+)$', text, re.MULTILINE)
    name = found[1] if found else name
  if hasattr(os, 'sched_getaffinity'):  # Linux; jobs of a sweep share cores.
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count()
  return f'{name or platform.machine()}, {cores} cores'


def _environment() -> dict[str, str]:
  """The variables that JAX and XLA read, but for where programs are cached."""
  caches = 'JAX_COMPILATION_CACHE', 'JAX_PERSISTENT_CACHE'
  return {
    name: value
    for name, value in sorted(os.environ.items())
    if name == 'XLA_FLAGS'
    or (name.startswith('JAX_') and not name.startswith(caches))
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
