"""Peers: installed where they disturb nothing, timed in turn with ours."""

from collections.abc import Callable, Sequence
import fcntl
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any
import venv

from nanomoe.run import cache

ROOT = pathlib.Path(__file__).parent.parent
_WORKERS = ROOT / 'benchmarks' / 'workers'

# By name: what pip installs, and the worker.
PEERS = {
  'nano-moe-jax': (['nano-moe-jax==0.1.0'], 'nano_moe_jax.py'),
  'torch-dense': (['torch==2.13.0', 'numpy'], 'torch_dense.py'),
  'transformers': (
    ['torch==2.13.0', 'transformers==5.23.0', 'numpy'],
    'transformers_moe.py',
  ),
}


def words(name: str) -> list[str]:
  """What starts the worker of a peer, which is installed if it is not."""
  requirements, worker = PEERS[name]
  return [str(python_with(name, requirements)), str(_WORKERS / worker)]


def python_with(name: str, requirements: list[str]) -> pathlib.Path:
  """The interpreter of an environment that has `requirements`, and is kept."""
  directory = cache.directory() / 'peers' / name
  python = directory / 'bin' / 'python'
  ready = directory / 'ready.json'
  directory.parent.mkdir(parents=True, exist_ok=True)
  with open(directory.with_suffix('.lock'), 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # Another process may install it.
    if not ready.exists() or json.loads(ready.read_text()) != requirements:
      print(f'installing {name} into {directory}', file=sys.stderr)
      venv.create(directory, clear=True, with_pip=True)
      subprocess.run(
        [python, '-m', 'pip', 'install', '-q', *requirements],
        check=True,
        stdout=sys.stderr,
      )
      ready.write_text(json.dumps(requirements))
  return python


def environment(ours: bool) -> dict[str, str]:
  """Each side as its user would run it.

  Our commands ask for huge pages themselves; those of others do not.
  """
  values = {**os.environ, 'PYTHONPATH': str(ROOT)} if ours else {**os.environ}
  if not ours:
    values.pop('GLIBC_TUNABLES', None)
    values.pop('PYTHONPATH', None)
  return values


class Worker:
  """A process that times when told to, and is idle otherwise.

  Args:
    name: 'ours', or a peer.
  """

  def __init__(self, name: str):
    ours = [sys.executable, '-m', 'benchmarks.workers.ours']
    self._process = subprocess.Popen(
      ours if name == 'ours' else words(name),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=environment(name == 'ours'),
    )

  def __call__(self, what: str, n: int) -> list[float]:
    """Seconds of `what`, n times."""
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin and stdout
    print(what, n, file=stdin, flush=True)
    return json.loads(stdout.readline())

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *_) -> None:
    assert self._process.stdin
    self._process.stdin.close()
    self._process.wait()


def interleave(
  timers: dict[str, Callable[[int], list[float]]], *, blocks: int, n: int
) -> dict[str, dict[str, Any]]:
  """Returns the summary of each timer's seconds: `n` at a time, in turn.

  The first block compiles and does not count. One more call precedes each
  block, because an idle process has lost caches and pages.

  Args:
    timers: Functions that return the seconds of n calls, by name.
    blocks: Number of blocks that count.
    n: Calls of a block.
  """
  seconds: dict[str, list[float]] = {name: [] for name in timers}
  for i in range(blocks + 1):
    for name, timer in timers.items():
      timer(1)
      took = timer(n)
      if i:
        seconds[name] += took
  return {name: summary(values) for name, values in seconds.items()}


def summary(seconds: Sequence[float]) -> dict[str, Any]:
  """Median, spread (the quartiles) and how many."""
  low, median, high = statistics.quantiles(seconds, n=4, method='inclusive')
  return {
    'median_sec': median,
    'quartiles_sec': [low, high],
    'min_sec': min(seconds),
    'samples': len(seconds),
  }


def peak_memory(arguments: Sequence[str], *, ours: bool) -> int:
  """Bytes that a process, run to its end, held at most."""
  process = subprocess.Popen(
    arguments, cwd=ROOT, env=environment(ours), stdout=subprocess.DEVNULL
  )
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f'{arguments} ended with status {status}')
  return usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
