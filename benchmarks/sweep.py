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


class Run(NamedTuple):
  """A config file, and {key: value} of what differs from it."""

  config: str
  changes: Mapping[str, Any] = {}
  seed: int = 0

  def job(self, name: str) -> Job:
    """Returns the run as a job of a sweep."""
    changes = {**self.changes, 'seed': self.seed}
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
    if run.job(name).status(directory / name) == 'done':
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
) -> None:
  """The command of a study; `table` makes Markdown of its figures."""
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
    jobs = [run.job(name) for name, run in runs.items()]
    outcomes = [] if only_table.value else runner.run(jobs, directory)
    figures = {'runs': gather(runs, directory)}
    results.write(study, figures)
    print(table(results.read(study) or {}))
    failed = [outcome for outcome in outcomes if outcome.status != 'done']
    for outcome in failed:
      text = f'{outcome.name}: {outcome.status}: {outcome.reason}'
      print(f'error: {text}', file=sys.stderr)
    return 1 if failed else 0

  cli.run(start, lambda argv: cli.parse_flags(argv, values, usage))
