"""Command that compares runs: their configs, their costs and their losses."""

from collections.abc import Collection, Mapping, Sequence
import datetime
import os
import pathlib
import shutil
import sys
from typing import Any

from absl import flags

from nanomoe.config import home
from nanomoe.config import overrides as config_lib
from nanomoe.config.overrides import Override
from nanomoe.run import cli, terminal, trusted_imports
from nanomoe.run import workdir as workdir_lib
from nanomoe.sweeps import minutes as minutes_lib
from nanomoe.sweeps import runner
from nanomoe.sweeps.jobs import ENDED
from trainers.errors import UserError
from trainers.files import write_atomically

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.compare RUN RUN ... [--format=md] [--html=FILE]

Compares runs: the keys in which their configs differ, their costs, and their
validation loss at equal steps, tokens, training FLOPs and seconds. Seeds are
grouped, and differences are paired by seed. RUN is the directory of a run, a
directory that contains runs, or a pattern.

python -m nanomoe.compare --train configs/dense.py configs/base.py --seeds=3 \
  --minutes=5

Trains each config with each seed for equal minutes, then compares the runs.
"""
_FLAGS = flags.FlagValues()
_FLAGS.set_gnu_getopt()  # Options may follow the runs.
_FORMAT = flags.DEFINE_enum(
  'format',
  'text',
  ['text', 'md', 'json', 'csv'],
  'Format of the output. CSV has a row per run.',
  flag_values=_FLAGS,
)
_PLOT = flags.DEFINE_string(
  'plot',
  None,
  "Path of a figure of the losses, .png or .svg. It needs 'nanomoe[plot]'.",
  flag_values=_FLAGS,
)
_HTML = flags.DEFINE_string(
  'html',
  None,
  'Path of a page with figures and tables. It works offline.',
  flag_values=_FLAGS,
)
_TRAIN = flags.DEFINE_bool(
  'train',
  False,
  'Trains the config files that are named in place of runs.',
  flag_values=_FLAGS,
)
_SEEDS = flags.DEFINE_integer(
  'seeds',
  None,
  'Number of seeds of each config, from 0. Default: 3.',
  flag_values=_FLAGS,
)
_MINUTES = flags.DEFINE_float(
  'minutes',
  None,
  'Minutes of training of each run, without compilation, evaluation and '
  'checkpoints. Default: 5.',
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'Directory of the trained runs. Default: runs/compare-<configs>-<date>.',
  flag_values=_FLAGS,
)
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)
_MAX_MINUTES = 1_000_000


def compare(
  runs: Sequence[str | os.PathLike[str]],
  *,
  plot: str | os.PathLike[str] | None = None,
  html: str | os.PathLike[str] | None = None,
  allow_imports: Collection[str] = (),
) -> dict[str, Any]:
  """Returns a comparison of runs as JSON values.

  docs/guides/comparing.md describes the keys. Runs that cannot be compared are
  in `apart`, each with a reason.

  Args:
    runs: Directories of runs, directories that contain runs, or patterns.
    plot: Path of a figure to write, .png or .svg; None for no figure.
    html: Path of a page to write; None for no page.
    allow_imports: Import paths that the configs of the runs may name.

  Raises:
    UserError: An argument names no run, fewer than two runs can be compared,
      matplotlib is missing, or a file cannot be written.
  """
  words = [os.fspath(run) for run in runs]
  plot_path = _output(plot, '--plot')
  html_path = _output(html, '--html')
  if not words:
    raise UserError('RUN: it is missing; name the directories of two runs')

  from nanomoe.comparison import page, summary  # noqa: PLC0415 (JAX)
  from nanomoe.comparison import plot as plot_lib  # noqa: PLC0415

  if plot_path:
    plot_lib.check(plot_path)
  value = summary.make(words, allow_imports)
  if plot_path:
    plot_lib.write(value, plot_path)
  if html_path:
    try:
      write_atomically(html_path, page.render(value))
    except OSError as error:
      raise UserError(f'--html={html_path}: {error.strerror}') from error
  return value


def train(
  configs: Sequence[str | os.PathLike[str]],
  *,
  seeds: int = 3,
  minutes: float = 5.0,
  out: str | os.PathLike[str] | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> list[pathlib.Path]:
  """Trains configs for equal minutes; returns the directories of the runs.

  The same call resumes, and trains only what is missing. One run trains at a
  time.

  Args:
    configs: Paths of config files, at least two.
    seeds: Number of seeds of each config, from 0.
    minutes: Minutes of training of each run, without compilation, evaluation
      and checkpoints.
    out: Directory of the runs; None for runs/compare-<configs>-<date>.
    overrides: Values of config keys in all runs.

  Raises:
    UserError: A line for each mistake, or for each run that failed.
    KeyboardInterrupt: A signal came. The running job has saved its state.
  """
  pairs = config_lib.from_values(overrides or {})
  return _train([os.fspath(x) for x in configs], seeds, minutes, out, pairs)


def _train(
  configs: Sequence[str],
  seeds: int,
  minutes: float,
  out: str | os.PathLike[str] | None,
  overrides: Sequence[Override],
) -> list[pathlib.Path]:
  lines = []
  if len(configs) < 2:
    lines.append('--train: it needs the paths of at least two config files')
  if seeds < 1:
    lines.append(f'--seeds={seeds}: it must be >= 1')
  if not 0.01 <= minutes <= _MAX_MINUTES:  # Neither is a NaN.
    lines.append(
      f'--minutes={minutes}: it must be >= 0.01 and <= {_MAX_MINUTES:,}'
    )
  if lines:
    raise UserError(lines)
  if out is None:
    stems = '-'.join(pathlib.Path(config).stem for config in configs)
    # The date alone: the same command finds the runs of a killed one.
    out = f'runs/compare-{stems}-{datetime.date.today():%Y%m%d}'
  directory = pathlib.Path(home.expand(os.fspath(out), '--out')).absolute()
  if lines := workdir_lib.problems(directory):
    raise UserError([line.replace('--workdir=', '--out=', 1) for line in lines])
  jobs = minutes_lib.make(configs, seeds, minutes, overrides, directory)
  outcomes = runner.run(jobs, directory)
  if lines := [
    f'{directory / x.name}: {x.status}: {x.reason}'
    for x in outcomes
    # A run that has diverged is compared up to its last finite loss.
    if x.status not in ENDED
  ]:
    raise UserError(
      [*lines, f'nanomoe compare {directory}: this compares the other runs']
    )
  return [directory / job.name for job in jobs]


def _output(
  path: str | os.PathLike[str] | None, key: str
) -> pathlib.Path | None:
  """Returns the path of an output file, whose directory must exist."""
  if path is None:
    return None
  file = pathlib.Path(home.expand(os.fspath(path), key))
  if not os.path.isdir(file.parent):
    raise UserError(
      f'{key}={path}: {file.parent} is no directory; it must exist'
    )
  if os.path.exists(file) and not os.path.isfile(file):
    kind = 'a directory' if os.path.isdir(file) else 'a device or a pipe'
    raise UserError(f'{key}={path}: it is {kind}; it must be a file')
  if not os.access(file.parent, os.W_OK | os.X_OK):
    raise UserError(f'{key}={path}: {file.parent} is not writable')
  if key == '--html' and file.suffix != '.html':
    raise UserError(f'{key}={path}: the path must end in .html')
  return file


def _parse(argv: list[str]) -> tuple[list[str], list[Override]]:
  """Returns the runs or configs, and the overrides of trained configs."""
  argv, overrides = config_lib.split_arguments(argv)
  words = cli.parse_flags(argv, _FLAGS, _USAGE, takes_words=True)
  if not _TRAIN.value:
    given = [x for x in (_SEEDS, _MINUTES, _OUT) if x.value is not None]
    lines = [f'--{x.name}={x.value}: it needs --train' for x in given]
    lines += [f'--config.{k}={v}: it needs --train' for k, v in overrides]
    if lines:
      raise UserError(lines)
  return words, overrides


def main(parsed: tuple[list[str], list[Override]]) -> int:
  """Prints the comparison that the flags ask for; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  words, overrides = parsed
  if _TRAIN.value:
    from nanomoe.comparison import plot  # noqa: PLC0415 (NumPy)

    if path := _output(_PLOT.value, '--plot'):
      plot.check(path)
    _output(_HTML.value, '--html')
    seeds = 3 if _SEEDS.value is None else _SEEDS.value
    minutes = 5.0 if _MINUTES.value is None else _MINUTES.value
    runs = _train(words, seeds, minutes, _OUT.value, overrides)
    words = [str(path) for path in runs]
  value = compare(
    words,
    plot=_PLOT.value,
    html=_HTML.value,
    allow_imports=_ALLOW_IMPORTS.value,
  )
  from nanomoe.comparison import tables  # noqa: PLC0415 (JAX)

  width = shutil.get_terminal_size().columns
  if _FORMAT.value == 'csv':  # It has no place for them.
    for run in value['apart']:
      print(f'{run["name"]}: apart: {run["reason"]}', file=sys.stderr)
    for remark in value['remarks']:
      print(remark, file=sys.stderr)
  cli.show(tables.render(value, _FORMAT.value, width))
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
