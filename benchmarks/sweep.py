"""Named runs, one after the other, that go on where they were stopped.

A module with a table of runs is a study: `python -m benchmarks.STUDY
--workdir=DIR` trains each in DIR/NAME by `python -m nanomoe.main`, then writes
benchmarks/results/STUDY.json and prints its table. The same command goes on
after Ctrl-C, SIGTERM or kill -9, and skips what is done; DIR/sweep.log tells
all. With --table, nothing is trained: the figures are of what is done.
"""

from collections.abc import Callable, Collection, Mapping
import datetime
import fcntl
import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

from absl import flags

from benchmarks import results, variant
from benchmarks.peers import ROOT
from nanomoe import experiment
from nanomoe.config import home
from nanomoe.config import overrides as config_lib
from nanomoe.config.schema import Config
from nanomoe.model.build import generation_problem
from nanomoe.run import cli


class Earlier(str):
  """Name of an earlier run of a study, as a value: the run's directory."""


class Run(NamedTuple):
  """A config file, and {key: value} of what differs from it."""

  config: str
  changes: Mapping[str, Any] = {}
  seed: int = 0

  def words(self, directory: pathlib.Path) -> list[str]:
    """The command that starts it there, and goes on with it."""
    changes = {**self.changes, 'seed': self.seed}
    for key, value in changes.items():
      if isinstance(value, Earlier):
        changes[key] = directory.parent / value
    return [
      *(sys.executable, '-m', 'nanomoe.main', '-q'),
      *(f'--config={self.config}', f'--workdir={directory}'),
      *(f'--config.{key}={value}' for key, value in changes.items()),
    ]

  def load(self) -> Config:
    changes = [(key, str(value)) for key, value in self.changes.items()]
    return config_lib.apply(config_lib.load_file(self.config), changes)


def train(runs: Mapping[str, Run], directory: pathlib.Path) -> list[str]:
  """Trains all that are not done; the names of those that failed."""
  directory.mkdir(parents=True, exist_ok=True)
  failed = []
  with open(directory / 'sweep.log', 'a', encoding='utf-8') as log:
    for name, run in runs.items():
      words = run.words(directory / name)
      _wait_for_other_process(directory / name)
      if is_done(directory / name, words):
        continue
      _tell(log, f'{name}: {" ".join(words)}')
      code = _call(words, log)
      _tell(log, f'{name}: exit code {code}')
      if code == cli.INTERRUPTED:
        raise KeyboardInterrupt
      failed += [name] if code else []
  return failed


def is_done(directory: pathlib.Path, words: list[str]) -> bool:
  """Whether these words finished it: after others they may mean more steps."""
  path = directory / 'result.json'
  result = json.loads(path.read_text()) if path.exists() else {}
  return result.get('status') == 'done' and result['argv'][1:] == words[3:]


def gather(runs: Mapping[str, Run], directory: pathlib.Path) -> dict[str, Any]:
  """{name: figures} of the runs that are done."""
  figures = {}
  for name, run in runs.items():
    if is_done(directory / name, run.words(directory / name)):
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
    failed = [] if only_table.value else train(runs, directory)
    more = results.read(study) or {} if only_table.value else measure(directory)
    results.write(study, {**more, 'runs': gather(runs, directory)})
    print(table(results.read(study) or {}))
    for name in failed:
      print(f'error: {name} failed: {directory}/sweep.log', file=sys.stderr)
    return 1 if failed else 0

  cli.run(start, lambda argv: cli.parse_flags(argv, values, usage))


def _call(words: list[str], log: Any) -> int:
  # Ctrl-C is for us alone: a second signal would end it before it saved.
  process = subprocess.Popen(
    words, cwd=ROOT, stdout=log, stderr=log, process_group=0
  )
  try:
    return process.wait()
  except KeyboardInterrupt:
    process.terminate()  # It saves.
    process.wait()
    raise


def _wait_for_other_process(directory: pathlib.Path) -> None:
  """The run of a sweep that was killed goes on, and holds its log."""
  if (directory / 'log.txt').exists():
    with open(directory / 'log.txt', encoding='utf-8') as log:
      fcntl.flock(log, fcntl.LOCK_EX)


def _tell(log: Any, line: str) -> None:
  now = datetime.datetime.now().isoformat(' ', 'seconds')
  for file in (log, sys.stderr):
    print(now, line, file=file, flush=True)
