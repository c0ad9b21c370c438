"""Figure of a comparison, drawn by matplotlib."""

from collections.abc import Mapping
import importlib
import importlib.util
import pathlib
import textwrap
from typing import Any

from nanomoe.comparison.curves import AXES, LABELS
from trainers.errors import UserError

SUFFIXES = ('.png', '.svg')
# Colors that color-blind people can tell apart. Okabe and Ito 2008.
COLORS = (
  *('#0072b2', '#d55e00', '#009e73', '#cc79a7'),
  *('#e69f00', '#56b4e9', '#7f7f7f'),
)
_LEGEND_WIDTH = 110  # Characters.
_LINES = ('-', '--', ':', '-.')
_INCHES_PER_LINE = 0.22  # Of the legend.


def check(path: pathlib.Path) -> None:
  """Checks that a figure can be drawn.

  Raises:
    UserError: The suffix is wrong, or matplotlib is missing.
  """
  if path.suffix not in SUFFIXES:
    raise UserError(
      f'--plot={path}: the suffix is {path.suffix!r}; it must be one of '
      f'{", ".join(SUFFIXES)}'
    )
  if not importlib.util.find_spec('matplotlib'):
    raise UserError(
      f"--plot={path}: matplotlib is not installed; install 'nanomoe[plot]', "
      'or use --html'
    )


def label(group: Mapping[str, Any]) -> str:
  """Returns the name of a group with its config, for a legend."""
  config = ', '.join(
    f'{k}={v}' for k, v in group['config'].items() if v not in (None, '')
  )
  return f'{group["name"]}: {config}' if config else group['name']


def axes_of(value: Mapping[str, Any]) -> list[str]:
  """Returns the axes along which a run has a curve."""
  return [
    axis for axis in AXES if any(run['curves'][axis] for run in value['runs'])
  ]


def write(value: Mapping[str, Any], path: pathlib.Path) -> None:
  """Writes the loss of each run along each axis, a color per group.

  Args:
    value: Comparison, as of `summary.make`.
    path: Path of the figure, with a suffix of `SUFFIXES`.

  Raises:
    UserError: The file cannot be written.
  """
  # A figure without pyplot needs no display, and changes no global state.
  figure_lib = importlib.import_module('matplotlib.figure')
  labels = {
    group['name']: textwrap.fill(label(group), _LEGEND_WIDTH)
    for group in value['groups']
  }
  num_lines = sum(text.count('\n') + 1 for text in labels.values())
  size = 10, 6.5 + _INCHES_PER_LINE * num_lines
  figure = figure_lib.Figure(figsize=size, layout='constrained')
  grid = figure.subplots(2, 2, sharey=True).ravel()
  styles = {
    name: {
      'color': COLORS[i % len(COLORS)],
      'linestyle': _LINES[i // len(COLORS) % len(_LINES)],
    }
    for i, name in enumerate(labels)
  }
  for axis, axes in zip(AXES, grid, strict=True):
    for run in value['runs']:
      if curve := run['curves'][axis]:
        axes.plot(
          curve['positions'],
          curve['losses'],
          **styles[run['group']],
          linewidth=1,
          marker='.',
          markersize=3,
        )
    if (equal := value['equal'][axis]['point']) is not None:
      axes.axvline(equal, color='gray', linewidth=0.8, linestyle=':')
    axes.set_xlabel(LABELS[axis])
    axes.spines[['top', 'right']].set_visible(False)
  for axes in grid[::2]:
    axes.set_ylabel(f'validation loss, {value["unit"]}')
  lines_lib = importlib.import_module('matplotlib.lines')
  handles = [
    lines_lib.Line2D([], [], label=text, **styles[name])
    for name, text in labels.items()
  ]
  legend = figure.legend(
    handles=handles, loc='outside upper center', frameon=False
  )
  for text in legend.get_texts():
    text.set_parse_math(False)  # A "$" of a config value is no formula.
  try:
    figure.savefig(path, dpi=150)
  except OSError as error:
    raise UserError(f'--plot={path}: {error.strerror}') from error
