"""Estimate of the time that a sweep takes, from measured runs."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
from typing import Any, NamedTuple

from nanomoe.sweeps import runner
from nanomoe.sweeps.jobs import Job
from trainers.errors import UserError

# Steps of the run that is timed if no run of the sweep is done.
TIMED_STEPS = 20


class Speed(NamedTuple):
  """Seconds that the parts of a run take.

  Attributes:
    start: Seconds of the start, with compilation and the first step.
    token: Seconds of training for each token.
    evaluation: Seconds of an evaluation, with its checkpoint and samples.
  """

  start: float
  token: float
  evaluation: float

  def seconds(self, values: Mapping[str, Any]) -> float:
    """Returns the seconds of a run with these config values."""
    steps = values['num_train_steps']
    tokens = (steps - 1) * values['batch_size'] * values['block_size']
    evaluations = steps / values['eval_interval']
    return self.start + tokens * self.token + evaluations * self.evaluation


class Estimate(NamedTuple):
  """Time that the jobs of a sweep will take.

  Attributes:
    seconds: Seconds until all are done.
    source: Runs that were measured.
  """

  seconds: float
  source: str


def make(
  jobs: Sequence[Job],
  left: Sequence[Job],
  out: pathlib.Path,
  num_parallel: int,
) -> Estimate:
  """Returns an estimate of the time of the jobs that are left.

  The seconds of a token are those of the measured runs: models of other sizes
  take other times.

  Args:
    jobs: All jobs.
    left: Jobs that are not done.
    out: Directory of the sweep, whose finished runs are measured. If there is
      none, the first job that is left trains for a few steps.
    num_parallel: Number of jobs at a time.

  Raises:
    UserError: The few steps have failed.
  """
  done = [job for job in jobs if job.status(out / job.name) == 'done']
  if done:
    speeds = [_speed(out / job.name, job) for job in done]
    source = f'measured on {len(done)} finished runs'
  else:
    speeds, source = [Speed(0.0, 0.0, 0.0)], ''
    if left:
      # The first step is compilation: a run of two has a speed.
      steps = min(TIMED_STEPS, max(left[0].values['num_train_steps'], 2))
      speeds = [timed(left[0], steps, num_parallel)]
      source = f'measured on {steps} steps of {left[0].name}'
  speed = Speed(*map(statistics.median, zip(*speeds, strict=True)))
  total = sum(speed.seconds(job.values) for job in left)
  num_parallel = min(num_parallel, max(len(left), 1))
  return Estimate(total / num_parallel, source)


def _speed(workdir: pathlib.Path, job: Job) -> Speed:
  """Returns the speed of a finished run."""
  result = json.loads((workdir / 'result.json').read_text(encoding='utf-8'))
  seconds = result['seconds_by_phase']
  values = job.values
  start = seconds.get('start', 0.0) + seconds.get('compile', 0.0)
  rest = sum(seconds.values()) - start - seconds.get('train', 0.0)
  tokens = values['batch_size'] * values['block_size']
  # A run of one step has no speed: its step belongs to the compilation.
  rate = result.get('steps_per_sec') or math.inf
  evaluations = max(result['step'] / values['eval_interval'], 1.0)
  return Speed(start, 1 / (rate * tokens), rest / evaluations)


def timed(job: Job, num_steps: int, num_parallel: int = 1) -> Speed:
  """Returns the speed of a few steps of a job, in a temporary directory.

  Args:
    job: The job.
    num_steps: Number of steps to train, at least 2.
    num_parallel: Number of jobs that divide the cores.

  Raises:
    UserError: The job has failed.
  """
  names = 'num_train_steps', 'eval_interval', 'log_interval'
  changed = [(name, str(num_steps)) for name in names]
  short = dataclasses.replace(job, overrides=[*job.overrides, *changed])
  with tempfile.TemporaryDirectory(prefix='nanomoe-sweep-') as directory:
    (outcome,) = runner.run(
      [short], pathlib.Path(directory), num_parallel=num_parallel
    )
    if outcome.status != 'done':
      raise UserError(f'{job.name}: {outcome.status}: {outcome.reason}')
    return _speed(pathlib.Path(directory) / job.name, short)
