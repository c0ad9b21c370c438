"""Random search and Optuna: jobs that are drawn, reproducible by a seed."""

from collections.abc import Callable, Sequence
import importlib.util
import math
import pathlib
from typing import Any, NamedTuple
import warnings

import numpy as np

from nanomoe.config import schema
from nanomoe.config.overrides import number
from nanomoe.sweeps import runner, table
from nanomoe.sweeps.grid import Assignment, Axis, Range
from nanomoe.sweeps.jobs import Job
from nanomoe.sweeps.outcomes import OPEN, Outcome
from trainers.errors import UserError

# Draws of a job before the values are found to be exhausted.
_MAX_DRAWS = 1000
# Drawn floats have so many significant digits: names of runs stay short.
_DIGITS = 4


class Dimension(NamedTuple):
  """Values that a key may have in a search.

  Attributes:
    key: Dotted config key.
    choices: Values of a list; () for a range.
    low, high: Ends of a range, both included.
    is_int: Whether the range has integers only.
    is_log: Whether the logarithm of the value is uniform.
  """

  key: str
  choices: tuple[str, ...] = ()
  low: float = 0.0
  high: float = 0.0
  is_int: bool = False
  is_log: bool = False

  def draw(self, rng: np.random.Generator) -> str:
    """Returns a random value."""
    if self.choices:
      return self.choices[rng.integers(len(self.choices))]
    if self.is_int:
      return str(rng.integers(int(self.low), int(self.high), endpoint=True))
    if self.is_log:
      return self.rounded(
        math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
      )
    return self.rounded(rng.uniform(self.low, self.high))

  def rounded(self, value: float) -> str:
    """Returns a float of the range with few digits."""
    value = float(f'{value:.{_DIGITS}g}')
    return repr(min(max(value, self.low), self.high))


def dimensions(axes: Sequence[Axis]) -> list[Dimension]:
  """Returns the dimensions of a search.

  A range is uniform for a key of integers, log-uniform for a key of floats,
  and uniform for a range of floats that begins at 0 or below.

  Raises:
    UserError: A range belongs to a key without numbers.
  """
  return [_dimension(axis) for axis in axes]


def random(
  found: Sequence[Dimension],
  num_jobs: int,
  seed: int,
  make: Callable[[Assignment], Job],
) -> list[Assignment]:
  """Returns different random assignments; more jobs begin with the same ones.

  Values that do not go together are drawn again.

  Args:
    found: Dimensions of the search.
    num_jobs: Number of jobs.
    seed: Seed of the draws.
    make: Returns the checked job of an assignment.

  Raises:
    UserError: The dimensions have fewer values than there are jobs.
  """
  assignments: list[Assignment] = []
  tried: set[tuple[str, ...]] = set()
  for index in range(num_jobs):
    rng = np.random.default_rng([seed, index])
    problem = None
    for _ in range(_MAX_DRAWS):
      drawn = {dimension.key: dimension.draw(rng) for dimension in found}
      if tuple(drawn.values()) in tried:
        continue
      tried.add(tuple(drawn.values()))
      try:
        make(drawn)
      except UserError as error:
        problem = error
        continue
      assignments.append(drawn)
      break
    else:
      raise (not assignments and problem) or UserError(
        f'--num_jobs={num_jobs}: {_MAX_DRAWS} draws from --over gave only '
        f'{index} different jobs'
      )
  return assignments


def optuna_ask(
  found: Sequence[Dimension],
  num_jobs: int,
  seed: int,
  num_parallel: int,
  make: Callable[[Assignment], Job],
) -> runner.Ask:
  """Returns a function that asks Optuna's TPE sampler for the next job.

  Job k depends on the outcomes of jobs 0 to k - `num_parallel` and on nothing
  else. So a killed sweep asks for the same jobs, whichever job was faster.

  Args:
    found: Dimensions of the search.
    num_jobs: Number of jobs.
    seed: Seed of the sampler.
    num_parallel: Number of jobs at a time.
    make: Returns the checked job of an assignment.

  Raises:
    UserError: Optuna is not installed.
  """
  if not importlib.util.find_spec('optuna'):
    raise UserError(
      "--search=optuna: Optuna is not installed; install 'nanomoe[sweep]'"
    )
  import optuna  # noqa: PLC0415 # pyright: ignore

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  space = {d.key: _distribution(d) for d in found}

  def trial_of(job: Job, outcome: Outcome | None):
    """Returns a job as a trial; a job without an outcome is running."""
    states = optuna.trial.TrialState
    loss = outcome.best_val_loss if outcome else None
    is_good = outcome and outcome.status in ('done', 'stopped')
    if outcome is None:
      state = states.RUNNING
    elif is_good and loss is not None and math.isfinite(loss):
      state = states.COMPLETE
    else:
      state = states.FAIL
    given = dict(job.overrides)
    return optuna.trial.create_trial(
      state=state,
      params={d.key: _param(d, given[d.key]) for d in found},
      distributions=space,
      value=loss if state == states.COMPLETE else None,
    )

  def ask(jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> Job | None:
    index = len(jobs)
    num_told = max(index - num_parallel + 1, 0)
    if index >= num_jobs or any(x.status in OPEN for x in outcomes[:num_told]):
      return None
    told = [*outcomes[:num_told], *[None] * (index - num_told)]
    with warnings.catch_warnings():
      # The option constant_liar is experimental: running jobs count as poor.
      warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
      sampler = optuna.samplers.TPESampler(
        seed=seed + index, constant_liar=True
      )
    study = optuna.create_study(sampler=sampler)
    study.add_trials(list(map(trial_of, jobs, told)))
    problem = None
    for _ in range(_MAX_DRAWS):
      params = study.ask(space).params
      try:
        job = make({d.key: _text(d, params[d.key]) for d in found})
      except UserError as error:  # Values that do not go together.
        problem = error
        continue
      if job.name not in {other.name for other in jobs}:
        return job
    raise problem or UserError(
      f'--num_jobs={num_jobs}: --over has only about {index} different jobs'
    )

  return ask


def stored(out: pathlib.Path, facts: dict[str, Any]) -> list[Assignment]:
  """Returns the assignments of an earlier Optuna sweep in `out`.

  Args:
    out: Directory of the sweep.
    facts: Constant values of this sweep.

  Raises:
    UserError: The earlier sweep has other values, or sweep.json is damaged.
  """
  old = table.read(out)
  if not old:
    return []
  for name, value in facts.items():
    if old.get(name) != value:
      raise UserError(
        f'--out={out}: its sweep has {name}={old.get(name)!r}, not {value!r}; '
        'choose another directory'
      )
  return [dict(job['overrides']) for job in old['jobs']]


def _dimension(axis: Axis) -> Dimension:
  is_range = len(axis.items) == 1 and isinstance(axis.items[0], Range)
  if not is_range:
    return Dimension(axis.key, tuple(axis.values()))
  first, last = axis.items[0]
  field = schema.FIELDS.get(axis.key)
  kind: type | None = field.kind if field else None
  if kind is None:  # An argument of a plug-in: the ends tell the type.
    kind = int if _is_int(first) and _is_int(last) else float
  where = f'--over={axis.key}={first}..{last}'
  if kind is int and _is_int(first) and _is_int(last):
    low, high = number(int, first), number(int, last)
    if max(abs(low), abs(high)) >= 1 << 63:
      raise UserError(f'{where}: the ends must be within 64 bits')
    return Dimension(axis.key, (), low, high, is_int=True)
  if kind is not float:
    raise UserError(f'{where}: the key has no such numbers; list its values')
  low, high = float(first), float(last)
  if not math.isfinite(high - low):
    raise UserError(f'{where}: the ends must be finite')
  return Dimension(axis.key, (), low, high, is_log=low > 0)


def _is_int(text: str) -> bool:
  try:
    number(int, text)
  except (ValueError, OverflowError):
    return False
  return True


def _distribution(dimension: Dimension):
  import optuna  # noqa: PLC0415 # pyright: ignore

  d = dimension
  if d.choices:
    return optuna.distributions.CategoricalDistribution(d.choices)
  if d.is_int:
    return optuna.distributions.IntDistribution(int(d.low), int(d.high))
  return optuna.distributions.FloatDistribution(d.low, d.high, log=d.is_log)


def _param(dimension: Dimension, text: str) -> str | int | float:
  """Returns a value as Optuna has it."""
  if dimension.choices:
    return text
  return int(text) if dimension.is_int else float(text)


def _text(dimension: Dimension, param: Any) -> str:
  is_float = not dimension.choices and not dimension.is_int
  return dimension.rounded(param) if is_float else str(param)
