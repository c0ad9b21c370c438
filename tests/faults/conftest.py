"""What a fault is: injected, promised, and what happened."""

from collections.abc import Callable
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.shrunk import ROOT, TINY

MAIN = [sys.executable, '-m', 'nanomoe.main']


@pytest.fixture(autouse=True)
def _fault(request, record_property):
  """Reports of a test carry what its `fault` marks say: the closest wins."""
  words = {}
  for mark in request.node.iter_markers('fault'):
    words = {**mark.kwargs, **words}
  for name, text in words.items():
    record_property(name, text)


@pytest.fixture
def happened(record_property) -> Callable[[str], None]:
  """happened(sentence): what the table of faults says of this test."""
  return lambda sentence: record_property('happened', sentence)


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
  `fault`: a name in `tests/faults/inject.py`, and its arguments.
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
    started.append(Started(words, output, {**os.environ, **(env or {})}))
    return started[-1]

  yield begin
  for one in started:
    one.process.kill()
    one.process.wait()


def metrics_of(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what a clock says."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if 'sec' not in k}
    for line in lines
  ]


def result_of(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / 'result.json').read_text())


def steps_of(workdir: pathlib.Path) -> list[int]:
  """The checkpoints that are there."""
  names = [p.name for p in (workdir / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdecimal())
