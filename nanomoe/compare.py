"""Command that compares runs: their configs, their costs and their losses."""

from collections.abc import Collection, Sequence
import os
import pathlib
import shutil
import sys
from typing import Any

from absl import flags

from nanomoe.config import home
from nanomoe.run import cli, terminal, trusted_imports
from trainers.errors import UserError
from trainers.files import write_atomically

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.compare RUN RUN ... [--format=md] [--html=FILE]

Compares runs: the keys in which their configs differ, their costs, and their
validation loss at equal steps, tokens, training FLOPs and seconds. Seeds are
grouped, and differences are paired by seed. RUN is the directory of a run, a
directory that contains runs, or a pattern.
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
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)


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


def _output(
  path: str | os.PathLike[str] | None, key: str
) -> pathlib.Path | None:
  """Returns the path of an output file, whose directory must exist."""
  if path is None:
    return None
  file = pathlib.Path(home.expand(os.fspath(path), key))
  if not file.parent.is_dir():
    raise UserError(
      f'{key}={path}: {file.parent} is no directory; it must exist'
    )
  if file.is_dir():
    raise UserError(f'{key}={path}: it is a directory; it must be a file')
  return file


def _parse(argv: list[str]) -> list[str]:
  """Returns the runs."""
  return cli.parse_flags(argv, _FLAGS, _USAGE, takes_words=True)


def main(words: list[str]) -> int:
  """Prints the comparison that the flags ask for; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  value = compare(
    words,
    plot=_PLOT.value,
    html=_HTML.value,
    allow_imports=_ALLOW_IMPORTS.value,
  )
  from nanomoe.comparison import tables  # noqa: PLC0415 (JAX)

  width = shutil.get_terminal_size().columns
  cli.show(tables.render(value, _FORMAT.value, width))
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
