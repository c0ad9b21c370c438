"""Checked sweep, before anything starts."""

from collections.abc import Sequence
import datetime
import itertools
import pathlib
from typing import Any, NamedTuple

from nanomoe.config import home, schema
from nanomoe.config import overrides as config_lib
from nanomoe.config.overrides import Override
from nanomoe.run import workdir as workdir_lib
from nanomoe.sweeps import grid, runner, search, table
from nanomoe.sweeps import jobs as jobs_lib
from nanomoe.sweeps.grid import Axis
from nanomoe.sweeps.jobs import ENDED, Job
from trainers.errors import UserError

SEARCHES = ('grid', 'random', 'optuna')
RULES = ('none', 'median')


class Options(NamedTuple):
  """Options of a sweep beside its config and its values.

  Attributes:
    jobs: Number of jobs at a time.
    search: 'grid', 'random' or 'optuna'.
    num_jobs: Number of jobs of a random or Optuna search.
    search_seed: Random seed of the search.
    early_stopping: 'none', or 'median' for the median stopping rule.
  """

  jobs: int = 1
  search: str = 'grid'
  num_jobs: int | None = None
  search_seed: int = 0
  early_stopping: str = 'none'


class Plan(NamedTuple):
  """Sweep whose jobs are checked.

  Attributes:
    out: Absolute directory of the sweep.
    jobs: Jobs that are known; Optuna adds others.
    options: Options of the sweep.
    ask: Returns further jobs; None for a search without Optuna.
    facts: Values of sweep.json beside the jobs.
  """

  out: pathlib.Path
  jobs: Sequence[Job]
  options: Options
  ask: runner.Ask | None
  facts: dict[str, Any]


def make(
  config: str,
  axes: Sequence[Axis],
  overrides: Sequence[Override],
  out: str | None,
  options: Options,
) -> Plan:
  """Returns a checked sweep.

  Args:
    config: Path of the config file.
    axes: Keys with values.
    overrides: Keys and values of all jobs.
    out: Directory of the sweep; None for runs/sweep-<config>-<date>.
    options: Other options.

  Raises:
    UserError: A line for each mistake. Nothing was written.
  """
  given = [
    {key: grid.text_of(key, x) for key, x in schema.flatten(item)}
    for item in config_lib.load_sweep(config)
  ]
  _check(config, bool(axes), bool(given), options)
  keys = {axis.key for axis in axes} | {key for item in given for key in item}
  grid.check_keys(keys, overrides)
  facts: dict[str, Any] = {
    'config': config,
    'overrides': dict(overrides),
    'over': {axis.key: list(map(str, axis.items)) for axis in axes},
    'search': options.search,
    'early_stopping': options.early_stopping,
  }
  if options.search != 'grid':
    facts['search_seed'] = options.search_seed
  directory = _directory(
    _default(config, facts, options.num_jobs) if out is None else out
  )
  ask, num_jobs = None, options.num_jobs or 0
  if options.search == 'grid':
    assignments = grid.expand(axes, given)
  else:
    found = search.dimensions(axes)

    def job_of(drawn):
      return jobs_lib.make(config, overrides, [drawn])[0]

    # For Optuna, they are checked in place of those that it will suggest.
    assignments = search.random(found, num_jobs, options.search_seed, job_of)
    if options.search == 'optuna':
      assignments = search.stored(directory, facts)
      ask = search.optuna_ask(
        found, num_jobs, options.search_seed, options.jobs, job_of
      )
  jobs = jobs_lib.make(config, overrides, assignments)
  jobs_lib.check_directories(jobs, directory)
  return Plan(directory, jobs, options, ask, facts)


def _check(
  config: str, has_axes: bool, has_sweep: bool, options: Options
) -> None:
  """Raises an error if options contradict each other or the config file.

  Args:
    config: Path of the config file.
    has_axes: Whether --over is given.
    has_sweep: Whether the file has a sweep() with jobs.
    options: Options of the sweep.

  Raises:
    UserError: A line for each mistake.
  """
  lines = []
  kind, num_jobs = options.search, options.num_jobs
  if kind not in SEARCHES:
    lines.append(f'search={kind!r}: it must be one of {", ".join(SEARCHES)}')
  if options.early_stopping not in RULES:
    lines.append(
      f'early_stopping={options.early_stopping!r}: it must be one of '
      f'{", ".join(RULES)}'
    )
  if options.jobs < 1:
    lines.append(f'jobs={options.jobs}: it must be >= 1')
  if not has_axes and not has_sweep:
    lines.append(
      '--over is missing; give --over=KEY=VALUE,VALUE, or write a sweep() '
      f'into {config}'
    )
  if kind == 'grid' and num_jobs is not None:
    lines.append(
      f'--num_jobs={num_jobs}: a grid has all jobs; it needs --search=random '
      'or --search=optuna'
    )
  if kind != 'grid' and num_jobs is None:
    lines.append(f'--search={kind}: --num_jobs is missing; give a number')
  if kind != 'grid' and has_sweep:
    lines.append(
      f'--search={kind}: {config} has a sweep(), which needs --search=grid'
    )
  if lines:
    raise UserError(lines)


def _default(
  config: str, facts: dict[str, Any], num_jobs: int | None = None
) -> str:
  """Returns the directory of a sweep without --out.

  It is the newest one of an unfinished sweep with the same facts, so that the
  same command resumes after midnight. Other sweeps of a day have a number.

  Args:
    config: Path of the config file.
    facts: Values of sweep.json beside the jobs.
    num_jobs: Number of jobs of a random or Optuna search.
  """
  start = f'runs/sweep-{pathlib.Path(config).stem}-'
  today = f'{start}{datetime.date.today():%Y%m%d}'
  for path in sorted(map(str, pathlib.Path().glob(f'{start}*')), reverse=True):
    old = _stored(path)
    is_same = old and all(old.get(key) == x for key, x in facts.items())
    if is_same and (path.startswith(today) or _is_open(old, num_jobs)):
      return path
  paths = itertools.chain([today], (f'{today}-{i}' for i in itertools.count(2)))
  return next(x for x in paths if not (pathlib.Path(x) / table.FILE).exists())


def _stored(path: str) -> dict[str, Any]:
  """Returns the sweep.json of a directory, {} if it is missing or damaged."""
  try:
    return table.read(pathlib.Path(path))
  except UserError:  # Of a sweep that this command need not continue.
    return {}


def _is_open(old: dict[str, Any], num_jobs: int | None) -> bool:
  """Returns whether the same command would train a job of a sweep."""
  jobs = old['jobs']
  ended = (*ENDED, 'stopped')
  return len(jobs) < (num_jobs or 0) or any(
    job['status'] not in ended for job in jobs
  )


def _directory(out: str) -> pathlib.Path:
  """Returns the absolute directory of a sweep.

  Raises:
    UserError: The directory cannot be written, or is that of a run.
  """
  if not out:
    raise UserError('--out=: it is empty; it must be a directory')
  path = pathlib.Path(home.expand(out, '--out')).absolute()
  if lines := workdir_lib.problems(path):
    raise UserError([line.replace('--workdir=', '--out=', 1) for line in lines])
  if (path / 'config.json').exists():
    raise UserError(
      f'--out={path}: it is the directory of a run; choose another directory'
    )
  return path
