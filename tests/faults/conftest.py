"""What a fault is: injected, promised, and what happened."""

from collections.abc import Callable
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.processes import Job
from tests.runs import metrics_of, result_of
from tests.shrunk import ROOT, TINY
from trainers.checkpoint import reader

MAIN = [sys.executable, '-m', 'nanomoe.main']


def fault(injected, promised):
  """A mark: a row of the table of faults."""
  return pytest.mark.fault(injected=injected, promised=promised)


@pytest.fixture(autouse=True)
def _fault(request, record_property):
  """Reports of a test carry what its `fault` marks say: the closest wins."""
  words = {}
  for mark in request.node.iter_markers('fault'):
    words = {**mark.kwargs, **words}
  for mark in request.node.iter_markers('reported'):
    words['reported'] = mark.args[0]
    break
  for name, text in words.items():
    record_property(name, text)


@pytest.fixture
def happened(record_property) -> Callable[..., None]:
  """happened(sentence, seconds=None): what the table says of this test.

  `seconds`: until all processes were gone; else the table has those of the
  test.
  """

  def say(sentence, seconds=None):
    record_property('happened', sentence)
    if seconds is not None:
      record_property('gone', round(seconds, 1))

  return say


@pytest.fixture
def warnings(caplog):
  """warnings() -> what was told, of level WARNING and above."""
  caplog.set_level(logging.INFO)
  return lambda: [
    r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING
  ]


class Started:
  """A process of the main job; its output goes to a file."""

  def __init__(self, words: list[str], output: pathlib.Path, env: dict):
    self.words, self._path = words, output
    with output.open('w') as file:
      self.process = subprocess.Popen(
        words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env
      )

  @property
  def output(self) -> str:
    return self._path.read_text()

  def end(self, seconds: float = 100) -> int:
    """The exit code; minus its number where a signal killed it."""
    try:
      return self.process.wait(seconds)
    except subprocess.TimeoutExpired:
      self.process.kill()
      raise AssertionError(f'it hangs: {self.output[-3000:]}') from None

  def until(self, condition: Callable[[], bool], seconds: float = 100) -> None:
    """Waits; fails where the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
      assert self.process.poll() is None, self.output[-3000:]
      assert time.monotonic() < end, self.output[-3000:]
      time.sleep(0.01)

  def signal(self, number: signal.Signals) -> None:
    self.process.send_signal(number)


@pytest.fixture
def start(corpus, tmp_path):
  """start(workdir, *words, changes={}, fault='', new=True) -> Started.

  `new`: with the tiny config and `changes`; else with the workdir's own config.
  `fault`: as the first arguments of `tests/faults/inject.py`.
  """
  started = []

  def begin(workdir, *words, changes=None, fault='', new=True, env=None):
    values = {**TINY, 'data.path': str(corpus), **(changes or {})}
    config = [
      '--config=configs/base.py',
      *(f'--config.{key}={value}' for key, value in values.items()),
    ]
    inject = [sys.executable, '-m', 'tests.faults.inject', *fault.split()]
    words = [
      *(inject if fault else MAIN),
      *(config if new else []),
      f'--workdir={workdir}',
      *words,
    ]
    output = tmp_path / f'output{len(started)}.txt'
    # With it, a process need not start itself again, having imported JAX.
    once = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'} if fault else {}
    environ = {**os.environ, **once, **(env or {})}
    started.append(Started(words, output, environ))
    return started[-1]

  yield begin
  for one in started:
    one.process.kill()
    one.process.wait()


@pytest.fixture
def launch(corpus, tmp_path):
  """launch(workdir, size=2, ...) -> Job, which ends with the test."""
  jobs = []

  def begin(workdir, size=2, **kwargs) -> Job:
    folder = tmp_path / f'job{len(jobs)}'
    jobs.append(Job(folder, workdir, size=size, **{'text': corpus, **kwargs}))
    return jobs[-1]

  yield begin
  for job in jobs:
    job.kill()


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory, corpus):
  """undisturbed(**mesh) -> workdir of two processes without a fault."""
  workdirs = {}

  def get(**mesh) -> pathlib.Path:
    key = tuple(sorted(mesh.items()))
    if key not in workdirs:
      folder = tmp_path_factory.mktemp('undisturbed')
      workdirs[key] = folder / 'run'
      job = Job(folder, workdirs[key], size=2, text=corpus, mesh=mesh)
      gone = job.start_all().gone(200)
      assert gone.codes == [0, 0], job.outputs()
    return workdirs[key]

  return get


def steps_of(workdir: pathlib.Path) -> list[int]:
  """The checkpoints that are there."""
  names = [p.name for p in (workdir / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdecimal())


def same_end(workdir, expected, tolerance=0.0) -> None:
  """Compares the last state bitwise, the metrics, the text and the result.

  Other programs round in other ways. With a tolerance, the state is therefore
  not compared: Adam makes steps of a bias whose gradient is rounding alone.
  """
  found, wanted = (
    reader.read(directory / 'checkpoints', '12')[0]
    for directory in (workdir, expected)
  )
  assert found.keys() == wanted.keys()
  for name, leaf in wanted.items():
    if not tolerance:
      np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    assert found[name].dtype == leaf.dtype
  assert_close(metrics_of(workdir), metrics_of(expected), tolerance)
  sample = (workdir / 'sample.txt').read_text()
  assert sample == (expected / 'sample.txt').read_text()
  result = result_of(workdir)
  for key in ('status', 'step', 'val_loss', 'best_step', 'skipped_updates'):
    assert_close(result[key], result_of(expected)[key], tolerance)


def assert_close(found, expected, tolerance: float) -> None:
  """Compares nested lists and dicts, numbers up to a relative tolerance."""
  found, tree = jax.tree.flatten(found)
  expected, expected_tree = jax.tree.flatten(expected)
  assert tree == expected_tree
  for x, y in zip(found, expected, strict=True):
    is_number = isinstance(y, float)
    assert x == (pytest.approx(y, rel=tolerance, abs=0) if is_number else y)
