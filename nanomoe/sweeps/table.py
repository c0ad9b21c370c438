"""Tables of a sweep: text for a terminal, and sweep.json."""

from collections.abc import Sequence
import json
import math
import pathlib
from typing import Any

from nanomoe.run import workdir
from nanomoe.sweeps.jobs import Job
from nanomoe.sweeps.outcomes import Outcome
from trainers.errors import UserError

FILE = 'sweep.json'
_HEADER = ('job', 'status', 'step', 'val loss', 'best val loss', 'at step')


def text(outcomes: Sequence[Outcome]) -> str:
  """Returns a row for each job, the best job, and a line for each failure."""
  rows = [_HEADER, *(_row(outcome) for outcome in outcomes)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(
      # Numbers end at the right, so that digits stand below each other.
      cell.ljust(width) if at < 2 else cell.rjust(width)
      for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  lines.insert(1, '  '.join('-' * width for width in widths))
  if found := best(outcomes):
    lines += ['', f'best: {found.name}']
  reasons = [f'{x.name}: {x.status}: {x.reason}' for x in outcomes if x.reason]
  return '\n'.join([*lines, *([''] * bool(reasons)), *reasons])


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
  """Returns the job with the smallest loss, the first of equal ones."""
  with_loss = [
    outcome
    for outcome in outcomes
    if outcome.best_val_loss is not None
    and math.isfinite(outcome.best_val_loss)
    and outcome.status in ('done', 'stopped')
  ]
  # Only outcomes with a loss are in the list.
  return min(with_loss, key=lambda x: x.best_val_loss or 0.0, default=None)


def read(out: pathlib.Path) -> dict[str, Any]:
  """Returns the content of sweep.json, {} if there is none.

  Args:
    out: Directory of the sweep.

  Raises:
    UserError: The file is damaged, or cannot be read.
  """
  path = out / FILE
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
    if not all(job.keys() >= {'status', 'overrides'} for job in value['jobs']):
      raise KeyError('status or overrides')
  except FileNotFoundError:
    return {}
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path}: the file is damaged ({error})') from error
  return value


def write(
  out: pathlib.Path,
  facts: dict[str, Any],
  jobs: Sequence[Job],
  outcomes: Sequence[Outcome],
) -> None:
  """Writes sweep.json, atomically.

  Args:
    out: Directory of the sweep.
    facts: Constant values of the sweep.
    jobs: All jobs.
    outcomes: Outcome of each job.

  Raises:
    UserError: The file cannot be written.
  """
  rows = [
    {
      **outcome._asdict(),
      'changes': dict(job.changes),
      'overrides': {k: v for k, v in job.overrides if k in job.changes},
    }
    for job, outcome in zip(jobs, outcomes, strict=True)
  ]
  workdir.write_json(out / FILE, {**facts, 'jobs': rows})


def _row(outcome: Outcome) -> tuple[str, ...]:
  return (
    outcome.name,
    outcome.status,
    str(outcome.step) if outcome.step else '',
    _number(outcome.val_loss),
    _number(outcome.best_val_loss),
    '' if outcome.best_step is None else str(outcome.best_step),
  )


def _number(value: float | None) -> str:
  return '' if value is None else f'{value:.6f}'
