"""Outcomes of jobs, as the files of their runs state them."""

import json
import pathlib
from typing import NamedTuple

from nanomoe.run import history
from nanomoe.sweeps.jobs import Job

METRIC = 'val/cross_entropy'
OUTPUT = 'output.txt'  # What the processes of a job have printed.
# Statuses of jobs that are trained further, by this command or by the next.
OPEN = ('running', 'pending', 'killed', 'interrupted')
# Those that the next command trains.
LEFT = (*OPEN, 'failed')


class Point(NamedTuple):
  """An evaluation.

  Attributes:
    step: Number of training steps before it.
    loss: Validation loss; NaN if it was not finite.
  """

  step: int
  loss: float


class Outcome(NamedTuple):
  """State that a job has reached. It has no times, so kills do not change it.

  Attributes:
    name: Name of the job.
    status: 'done', 'stopped' by the median rule, 'diverged', 'collapsed',
      'failed', 'killed', 'interrupted', 'running' or 'pending'.
    step: Step of the last evaluation; 0 if there is none.
    val_loss: Loss of the last evaluation.
    best_val_loss: Smallest loss of an evaluation.
    best_step: Step of the smallest loss.
    reason: Why the job failed, in one line.
  """

  name: str
  status: str
  step: int = 0
  val_loss: float | None = None
  best_val_loss: float | None = None
  best_step: int | None = None
  reason: str = ''


def curve(workdir: pathlib.Path, is_running: bool = False) -> list[Point]:
  """Returns the evaluations of a run, [] before the first.

  Args:
    workdir: Directory of the run.
    is_running: Whether a process writes to the run.

  Raises:
    UserError: metrics.jsonl is damaged.
  """
  return [Point(*p) for p in history.curve(workdir, METRIC, is_running)]


def size(workdir: pathlib.Path) -> int:
  """Returns the size of the recorded evaluations of a run, in bytes."""
  try:
    return (workdir / 'metrics.jsonl').stat().st_size
  except OSError:
    return 0


def make(
  job: Job, status: str, points: list[Point], reason: str = ''
) -> Outcome:
  """Returns the outcome of a job with these evaluations."""
  if not points:
    return Outcome(job.name, status, reason=reason)
  last = points[-1]
  best = min(points, key=lambda point: (point.loss != point.loss, point.loss))
  return Outcome(job.name, status, *last, best.loss, best.step, reason)


def is_running(workdir: pathlib.Path) -> bool:
  """Returns whether a process trains the run, in whatever phase it is.

  A job's output is locked as long as a process of it lives, also before the
  process has locked its log.
  """
  files = workdir / OUTPUT, workdir / 'log.txt'
  return any(history.is_locked(file) for file in files)


def reason_of(workdir: pathlib.Path, start: int, fallback: str) -> str:
  """Returns why a job failed: the last error that it has printed.

  Args:
    workdir: Directory of the run.
    start: Offset in the output at which the failed start began.
    fallback: Text for a job that has printed nothing.
  """
  try:
    data = (workdir / OUTPUT).read_bytes()[start:]
  except OSError:
    return fallback
  lines = data.decode('utf-8', 'backslashreplace').splitlines()
  lines = [line.strip() for line in lines if line.strip()]
  errors = [line for line in lines if line.startswith('error: ')]
  text = errors[-1].removeprefix('error: ') if errors else ''
  text = text or (lines[-1] if lines else fallback)
  return within(workdir.parent, text)


def failed_before(outcome: Outcome, workdir: pathlib.Path) -> Outcome:
  """Returns a pending outcome as failed, if the last start has failed."""
  try:
    path = workdir / 'result.json'
    result = json.loads(path.read_text(encoding='utf-8'))
    error = str(result['error']) if result['status'] == 'failed' else ''
  except (OSError, ValueError, KeyError, TypeError):
    return outcome
  if not error or is_running(workdir):
    return outcome
  reason = within(workdir.parent, error.splitlines()[0])
  return outcome._replace(status='failed', reason=reason)


def within(out: pathlib.Path, text: str) -> str:
  """Returns a line with paths below `out` as relative paths.

  The table of a sweep does not depend on the place of its directory.
  """
  return text.replace(f'{out}/', '')


def stop_reason(workdir: pathlib.Path, status: str) -> str:
  """Returns why a run has stopped, '' for a run that is done."""
  if status == 'done':
    return ''
  result = json.loads((workdir / 'result.json').read_text(encoding='utf-8'))
  return str(result.get('stop_reason') or status)
