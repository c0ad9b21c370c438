"""Shapes are checked at run time, and compiled programs are shared."""

import fcntl
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jaxtyping

# Before the first import of what it checks.
jaxtyping.install_import_hook('nanomoe', 'beartype.beartype')

_TEMPORARY = tempfile.TemporaryDirectory(prefix='nanomoe-test-')
os.environ['XDG_STATE_HOME'] = _TEMPORARY.name
# Equal programs compile once in a session. A worker of pytest-xdist inherits
# the cache of the process that started it.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _TEMPORARY.name
# What tests say of dispatch and precision is said of CPUs.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('PYTHONUTF8', '1')  # Of the processes: ★, not \u2605.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
# Compilation takes most of a test's time. These flags make it quick and the
# programs slow. XLA_FLAGS='' compiles as users do: .ci/run sets it for slow
# tests that are marked `optimized`.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
)

# Compilation records no Python stacks.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from configs import base  # noqa: E402
from nanomoe.config import overrides as config_lib  # noqa: E402
from tests.shrunk import ROOT, TINY  # noqa: E402

# Meshes need devices. Processes that tests start have one, as users have.
jax.config.update('jax_num_cpu_devices', 8)

# Tracing makes many objects, and few of them are garbage.
gc.set_threshold(200_000, 20, 100)

# Files of pure tests: no processes, and no training. `-m inner` runs them.
INNER = {
  *('activations', 'attention', 'causal_blocks', 'cluster', 'config'),
  *(
    'comparison',
    'convolution',
    'dropout',
    'event_files',
    'heads',
    'history',
    'inspection',
    'hlo',
    'language',
    'losses',
    'metrics',
  ),
  *('ngrams', 'norms', 'numerics', 'optimizers', 'parameters', 'pictures'),
  *('positions', 'prefetch', 'report', 'spec', 'statistics', 'tokenizers'),
  *('trackers', 'windows', 'writers'),
}


def pytest_collection_modifyitems(items):
  for item in items:
    is_inner = item.path.stem.removeprefix('test_') in INNER
    if is_inner and not item.get_closest_marker('slow'):
      item.add_marker('inner')


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> pathlib.Path:
  """A text of 5,000 characters, 20 of them distinct."""
  letters = np.array(list('abcdefghijklmnopqrs\n'))
  text = ''.join(np.random.default_rng(0).choice(letters, 5000))
  path = tmp_path_factory.mktemp('corpus') / 'text.txt'
  path.write_text(text)
  return path


@pytest.fixture
def tiny(corpus):
  """tiny(**changes) -> base.py's config, shrunk, on the small text."""

  def make(changes: dict | None = None):
    values = {**TINY, 'data.path': str(corpus), **(changes or {})}
    overrides = [(key, str(value)) for key, value in values.items()]
    return config_lib.apply(base.get_config(), overrides)

  return make


@pytest.fixture
def command(corpus):
  """command(*arguments) -> the words that start the tiny run as a process."""

  def make(*arguments: str, changes: dict | None = None) -> list[str]:
    values = {**TINY, 'data.path': str(corpus), **(changes or {})}
    return [
      sys.executable,
      '-m',
      'nanomoe.main',
      '--config=configs/base.py',
      *(f'--config.{key}={value}' for key, value in values.items()),
      *arguments,
    ]

  return make


@pytest.fixture
def run():
  """run(words) -> the finished process, its output as text."""

  def start(words: list[str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
      words,
      cwd=kwargs.pop('cwd', ROOT),
      capture_output=True,
      text=True,
      timeout=kwargs.pop('timeout', 120),
      **kwargs,
    )

  return start


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture(scope='session')
def finished(tmp_path_factory, corpus):
  """A run that nothing interrupted: its workdir and its process."""
  base = tmp_path_factory.getbasetemp()
  # The workers of pytest-xdist have their directories in one.
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  original = shared / 'shared' / 'finished'
  original.parent.mkdir(exist_ok=True)
  output = original.parent / 'output.json'
  with (original.parent / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not output.exists():
      output.write_text(json.dumps(_finish(original, corpus)))
  # Tests start commands in it, so that each worker has a copy of its own.
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  shutil.copytree(original, workdir)
  text = output.read_text()
  text = text.replace(str(original.parent), str(workdir.parent))
  return workdir, subprocess.CompletedProcess(**json.loads(text))


def _finish(workdir: pathlib.Path, corpus: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of a process that trains the tiny run to its end."""
  values = {**TINY, 'data.path': corpus}
  process = subprocess.run(
    [
      sys.executable,
      '-X',
      'importtime',
      '-m',
      'nanomoe.main',
      '--config=configs/base.py',
      f'--workdir={workdir}',
      *(f'--config.{key}={value}' for key, value in values.items()),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  return vars(process)
