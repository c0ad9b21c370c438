"""What tests ask of runs: what is in their directories, what happened when."""

import json
import pathlib

from trainers.callbacks import Callback


def lines_of(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl."""
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def metrics_of(workdir: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what a clock says."""
  return [
    {k: v for k, v in line.items() if 'sec' not in k}
    for line in lines_of(workdir)
  ]


def result_of(workdir: pathlib.Path) -> dict:
  return json.loads((workdir / 'result.json').read_text())


class At(Callback):
  """Calls action(loop) at the end of some steps."""

  def __init__(self, action, *steps):
    self.action = action
    self.steps = steps

  def on_train_step_end(self, loop):
    if loop.step in self.steps:
      self.action(loop)


class Reports:
  """A CLU writer: the steps at which ReportProgress told the speed."""

  def __init__(self):
    self.steps = []

  def write_scalars(self, step, scalars):
    self.steps += [step] if 'steps_per_sec' in scalars else []
