"""Command that trains all jobs of a sweep, and resumes a killed one."""

from collections.abc import Mapping, Sequence
import datetime
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

from absl import flags

from nanomoe.config import help as help_lib
from nanomoe.config import overrides as config_lib
from nanomoe.config.overrides import Override
from nanomoe.run import cli
from nanomoe.sweeps import estimate, grid, runner, slurm, table
from nanomoe.sweeps import plan as plan_lib
from nanomoe.sweeps.jobs import Job
from nanomoe.sweeps.outcomes import LEFT, Outcome, is_running
from nanomoe.sweeps.plan import Options, Plan
from trainers.errors import UserError

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
nanomoe sweep --config=configs/base.py --over=optimizer.learning_rate=1e-4,3e-4
  --over=seed=0..2

Trains a run for each combination of the values, in a directory of its own, and
prints a table of the losses. The same command resumes a sweep that was killed,
and trains only what is missing.
"""
_FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Python file with get_config(), as in training. A function sweep() of the '
  'file may yield dicts of keys and values. --config.KEY=VALUE sets a key of '
  'all jobs.',
  required=True,
  flag_values=_FLAGS,
)
_OVER = flags.DEFINE_multi_string(
  'over',
  [],
  'KEY=VALUE,VALUE or KEY=FIRST..LAST: values of a config key. Both ends of a '
  'range are included. Several --over are combined.',
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'Directory of the sweep, with a run directory for each job. Default: '
  'runs/sweep-<config>-<date>, or that of an unfinished sweep of the same '
  'command.',
  flag_values=_FLAGS,
)
_JOBS = flags.DEFINE_integer(
  'jobs',
  None,
  'Number of jobs at a time, which divide the cores and the GPUs. Default: 1, '
  'or no limit for SLURM.',
  lower_bound=1,
  flag_values=_FLAGS,
)
_SEARCH = flags.DEFINE_enum(
  'search',
  'grid',
  list(plan_lib.SEARCHES),
  'grid: all combinations; random: --num_jobs random combinations; optuna: '
  'combinations that the TPE sampler of Optuna suggests.',
  flag_values=_FLAGS,
)
_NUM_JOBS = flags.DEFINE_integer(
  'num_jobs',
  None,
  'Number of jobs of a random or Optuna search.',
  lower_bound=1,
  upper_bound=grid.MAX_JOBS,
  flag_values=_FLAGS,
)
_SEARCH_SEED = flags.DEFINE_integer(
  'search_seed',
  0,
  'Random seed of the search.',
  lower_bound=0,
  upper_bound=2**32 - 1 - grid.MAX_JOBS,  # A seed of NumPy for each job.
  flag_values=_FLAGS,
)
_EARLY_STOPPING = flags.DEFINE_enum(
  'early_stopping',
  'none',
  list(plan_lib.RULES),
  'median: a job stops if its best loss is worse than the median of the mean '
  'losses of at least 3 jobs before it.',
  flag_values=_FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Lists the jobs and estimates the time; trains a few steps of a job in a '
  'temporary directory if no run is done.',
  flag_values=_FLAGS,
)
_LAUNCHER = flags.DEFINE_enum(
  'launcher',
  'local',
  ['local', 'slurm'],
  'slurm: writes an array script for sbatch, and trains nothing.',
  flag_values=_FLAGS,
)


class Sweep(NamedTuple):
  """Jobs of a sweep and what they have reached.

  Attributes:
    out: Directory of the sweep.
    jobs: Jobs, in the order of their starts.
    outcomes: Outcome of each job.
  """

  out: pathlib.Path
  jobs: Sequence[Job]
  outcomes: Sequence[Outcome]


def sweep(
  config: str | pathlib.Path,
  over: Mapping[str, str | Sequence[Any]] | None = None,
  *,
  out: str | pathlib.Path | None = None,
  overrides: Mapping[str, Any] | None = None,
  jobs: int = 1,
  search: str = 'grid',
  num_jobs: int | None = None,
  search_seed: int = 0,
  early_stopping: str = 'none',
) -> Sweep:
  """Trains all jobs of a sweep, and resumes a sweep that was killed.

  Args:
    config: Path of the config file.
    over: Values of each config key: a sequence, or text such as '0..2'.
    out: Directory of the sweep; None for runs/sweep-<config>-<date>.
    overrides: Values of config keys in all jobs.
    jobs: Number of jobs at a time.
    search: 'grid', 'random' or 'optuna'.
    num_jobs: Number of jobs of a random or Optuna search.
    search_seed: Random seed of the search.
    early_stopping: 'none', or 'median' for the median stopping rule.

  Returns:
    The jobs and their outcomes. A failed job does not raise an error.

  Raises:
    UserError: A line for each mistake in the jobs. None has started.
    KeyboardInterrupt: A signal came. The running jobs have saved their state.
  """
  options = Options(jobs, search, num_jobs, search_seed, early_stopping)
  pairs = config_lib.from_values(overrides or {})
  axes = grid.from_mapping(over or {})
  out = None if out is None else str(out)
  return _train(plan_lib.make(str(config), axes, pairs, out, options))


def _train(plan: Plan) -> Sweep:
  """Trains the jobs of a checked sweep."""
  jobs: list[Job] = list(plan.jobs)

  def record(all_jobs: Sequence[Job], outcomes: Sequence[Outcome]) -> None:
    jobs[:] = all_jobs
    table.write(plan.out, plan.facts, all_jobs, outcomes)

  outcomes = runner.run(
    plan.jobs,
    plan.out,
    num_parallel=plan.options.jobs,
    early_stopping=plan.options.early_stopping,
    ask=plan.ask,
    record=record,
  )
  return Sweep(plan.out, jobs, outcomes)


def _parse(argv: list[str]) -> list[Override]:
  """Returns the overrides. Absl parses the other words."""
  argv, overrides = config_lib.split_arguments(argv)
  cli.parse_flags(argv, _FLAGS, _USAGE, lambda: help_lib.keys(None))
  if _LAUNCHER.value == 'slurm':
    for flag, default in ((_SEARCH, 'optuna'), (_EARLY_STOPPING, 'median')):
      if flag.value == default:
        raise UserError(
          f'--{flag.name}={default}: its jobs depend on each other; it needs '
          '--launcher=local'
        )
  return overrides


def main(overrides: list[Override]) -> int:
  """Runs the sweep that the flags describe; returns the exit code."""
  options = Options(
    _JOBS.value or 1,
    _SEARCH.value,
    _NUM_JOBS.value,
    _SEARCH_SEED.value,
    _EARLY_STOPPING.value,
  )
  plan = plan_lib.make(
    _CONFIG.value, grid.parse(_OVER.value), overrides, _OUT.value, options
  )
  if _DRY_RUN.value:
    return _show_plan(plan)
  if _LAUNCHER.value == 'slurm':
    return _write_script(plan, _JOBS.value or 0)
  result = _train(plan)
  cli.show(table.text(result.outcomes) + '\n')
  missing = (options.num_jobs or 0) - len(result.jobs)
  if missing > 0:  # Optuna needs the outcomes of the jobs before.
    print(f'{missing} jobs are left; repeat the command', file=sys.stderr)
  is_whole = all(x.status in ('done', 'stopped') for x in result.outcomes)
  return 0 if is_whole and missing <= 0 else 1


def _show_plan(plan: Plan) -> int:
  """Prints the jobs and an estimate of the time; returns the exit code."""
  outcomes = runner.collect(plan.jobs, plan.out, plan.options.early_stopping)
  pairs = zip(plan.jobs, outcomes, strict=True)
  left = [job for job, outcome in pairs if outcome.status in LEFT]
  num_jobs = len(plan.jobs)
  if plan.ask:
    num_jobs = max(plan.options.num_jobs or 0, num_jobs)
    # A job stands for all that Optuna has not suggested yet.
    job = plan.ask(plan.jobs, outcomes) or plan.jobs[-1]
    left += [job] * (num_jobs - len(plan.jobs))
  cli.show(table.text(outcomes) + '\n\n')
  try:
    found = estimate.make(plan.jobs, left, plan.out, plan.options.jobs)
  except UserError as error:
    raise UserError([f'no estimate: {x}' for x in error.problems]) from error
  time = datetime.timedelta(seconds=round(found.seconds))
  source = f', {found.source}' if found.source else ''
  cli.show(f'{len(left)} of {num_jobs} jobs are left: about {time}{source}\n')
  return 0


def _write_script(plan: Plan, num_parallel: int) -> int:
  """Writes the script for sbatch; returns the exit code."""
  outcomes = runner.collect(plan.jobs, plan.out)
  indices = [i for i, x in enumerate(outcomes) if x.status in LEFT]
  running = [i for i in indices if is_running(plan.out / plan.jobs[i].name)]
  indices = [i for i in indices if i not in running]
  if running:
    print(f'{len(running)} jobs are running', file=sys.stderr)
  if not indices:
    cli.show(table.text(outcomes) + '\n')
    return 0
  if any(x.status == 'failed' for x in outcomes):
    print(table.text(outcomes), file=sys.stderr)
  path = slurm.write(plan.out, plan.jobs, indices, num_parallel)
  table.write(plan.out, plan.facts, plan.jobs, outcomes)
  print(f'{len(indices)} of {len(plan.jobs)} jobs are left', file=sys.stderr)
  cli.show(f'{shlex.join(["sbatch", str(path)])}\n')
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
