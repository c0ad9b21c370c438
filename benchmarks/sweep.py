"""Studies: tables of named runs, trained by the runner of `nanomoe sweep`.

`python -m benchmarks.STUDY --workdir=DIR` trains each run in DIR/NAME, then
writes benchmarks/results/STUDY.json and prints its table. The same command
resumes the study after Ctrl-C, SIGTERM or kill -9, and skips finished runs.
With --table, nothing is trained: the figures are those of finished runs.
"""

from collections.abc import Callable, Collection, Mapping
import pathlib
import sys
from typing import Any, NamedTuple

from absl import flags

from benchmarks import results, variant
from nanomoe import experiment
from nanomoe.config import home
from nanomoe.config import overrides as config_lib
from nanomoe.config.schema import Config
from nanomoe.model.build import generation_problem
from nanomoe.run import cli
from nanomoe.sweeps import runner
from nanomoe.sweeps.jobs import Job


class Earlier(str):
  """Name of an earlier run of a study, as a value: the run's directory."""


class Run(NamedTuple):
  """A config file, and {key: value} of what differs from it."""

  config: str
  changes: Mapping[str, Any] = {}
  seed: int = 0

  def job(self, name: str, directory: pathlib.Path) -> Job:
    """Returns the run as a job of a sweep.

    Args:
      name: Name of the run.
      directory: Directory of all runs of the study.
    """
    changes = {**self.changes, 'seed': self.seed}
    for key, value in changes.items():
      if isinstance(value, Earlier):
        changes[key] = directory / value
    overrides = [(key, str(value)) for key, value in changes.items()]
    return Job(name, self.config, overrides, changes)

  def load(self) -> Config:
    """Returns the config, with the seed of the file."""
    changes = [(key, str(value)) for key, value in self.changes.items()]
    return config_lib.apply(config_lib.load_file(self.config), changes)


def gather(runs: Mapping[str, Run], directory: pathlib.Path) -> dict[str, Any]:
  """{name: figures} of the runs that are done."""
  figures = {}
  for name, run in runs.items():
    if run.job(name, directory).status(directory / name) == 'done':
      config = experiment.resolve_auto(run.load())
      logged = results.of_run(directory / name)
      num_flops = variant.flops(config, logged['result']['vocab_size'])
      figures[name] = {
        **run._asdict(),
        'changes': {  # A path is this machine's; its name is not.
          key: value.name if isinstance(value, pathlib.PurePath) else value
          for key, value in run.changes.items()
        },
        'is_causal': not generation_problem(config),
        'gflop': num_flops / 1e9,
        **logged,
      }
  return figures


def by_variant(
  figures: Mapping[str, Any], names: Collection[str]
) -> dict[str, list[dict[str, Any]]]:
  """{VARIANT: figures of its seeds}, of VARIANT-SEED in `names`, if done."""
  found: dict[str, list[dict[str, Any]]] = {}
  for name, run in figures['runs'].items():
    if name in names:
      found.setdefault(name.rpartition('-')[0], []).append(run)
  return found


def main(
  study: str,
  runs: Mapping[str, Run],
  table: Callable[[dict[str, Any]], str],
  usage: str | None,
  measure: Callable[[pathlib.Path], dict[str, Any]] = lambda _: {},
) -> None:
  """Runs the command of a study.

  Args:
    study: Name of the study, and of its file of figures.
    runs: Runs by name, in the order in which they train.
    table: Makes Markdown of the figures.
    usage: Text of --help.
    measure: Returns further figures from the directory of the trained runs.
  """
  values = flags.FlagValues()
  workdir = flags.DEFINE_string(
    'workdir', None, 'Of all runs.', required=True, flag_values=values
  )
  only_table = flags.DEFINE_bool(
    'table', False, 'Trains nothing.', flag_values=values
  )

  def start(_: None) -> int:
    path = home.expand(str(workdir.value), '--workdir')
    directory = pathlib.Path(path).absolute()
    jobs = [run.job(name, directory) for name, run in runs.items()]
    outcomes = [] if only_table.value else runner.run(jobs, directory)
    more = results.read(study) or {} if only_table.value else measure(directory)
    results.write(study, {**more, 'runs': gather(runs, directory)})
    print(table(results.read(study) or {}))
    failed = [outcome for outcome in outcomes if outcome.status != 'done']
    for outcome in failed:
      text = f'{outcome.name}: {outcome.status}: {outcome.reason}'
      print(f'error: {text}', file=sys.stderr)
    return 1 if failed else 0

  cli.run(start, lambda argv: cli.parse_flags(argv, values, usage))
