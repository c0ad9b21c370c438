"""Comparison as text: for a terminal, as Markdown, JSON or CSV."""

from collections.abc import Mapping, Sequence
import csv
import html
import io
from typing import Any, NamedTuple

from nanomoe.comparison.curves import AXES, LABELS
from nanomoe.planning import hardware
from trainers.files import to_json

FORMATS = ('text', 'md', 'json', 'csv')
_MISSING = '-'
# Groups that have a column each in the table of configs.
_MAX_COLUMNS = 4
# Columns of a run in CSV, before those of the axes and of the config.
_COLUMNS = (
  *('name', 'workdir', 'group', 'seed', 'status', 'step', 'evaluated_step'),
  *('unit', 'loss', 'best_loss', 'num_params', 'num_active_params'),
  *('flops_per_token', 'active_flops_per_token', 'tokens_per_sec'),
  'peak_memory_bytes',
)


class Table(NamedTuple):
  """Table of a comparison.

  Attributes:
    title: Heading.
    header: Name of each column.
    rows: Texts of each row.
    note: Sentences below the table; empty for none.
  """

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ''


def render(value: Mapping[str, Any], form: str, width: int = 80) -> str:
  """Returns a comparison as text that ends with a newline.

  Args:
    value: Comparison, as of `summary.make`.
    form: One of `FORMATS`.
    width: Columns of the terminal, for 'text'.
  """
  if form == 'json':
    return to_json(value, indent=2) + '\n'
  if form == 'csv':
    return _csv(value)
  if form == 'md':
    return '\n'.join(_markdown(table) for table in tables(value))
  return _text(tables(value), width)


def tables(value: Mapping[str, Any]) -> list[Table]:
  """Returns the tables of a comparison, without empty ones."""
  found = [
    _configs(value),
    _costs(value),
    _runs(value),
    _losses(value),
    _differences(value),
    Table(
      'Not compared',
      ['run', 'reason'],
      [[each['name'], each['reason']] for each in value['apart']],
    ),
    Table('Remarks', ['remark'], [[line] for line in value['remarks']]),
  ]
  return [table for table in found if table.rows]


def _configs(value: Mapping[str, Any]) -> Table:
  """Returns the differing keys: a column per group, or a row if many."""
  groups, note = value['groups'], 'The configs of a group differ in the seed.'
  title = 'Keys in which the configs differ'
  if len(groups) > _MAX_COLUMNS:
    rows = [
      [group['name'], '\n'.join(f'{k}={_shown(v)}' for k, v in config.items())]
      for group in groups
      if (config := group['config'])
    ]
    return Table(title, ['group', 'config'], rows, note)
  rows = [
    [key, *(_shown(group['config'][key]) for group in groups)]
    for key in value['keys']
  ]
  header = ['key', *(f'group {group["name"]}' for group in groups)]
  return Table(title, header, rows, note)


def _costs(value: Mapping[str, Any]) -> Table:
  rows = [
    [
      group['name'],
      ' '.join(map(str, group['seeds'])),
      count(group['num_params']),
      count(group['num_active_params']),
      count(group['active_flops_per_token']),
      count(group['flops_per_token']),
    ]
    for group in value['groups']
  ]
  header = ['group', 'seeds', 'parameters', 'active', 'FLOPs/token', 'computed']
  note = (
    'FLOPs of training, forward and backward, by active experts alone; a '
    'multiply-add is 2. Computed FLOPs include padding, other experts and '
    'recomputation.'
  )
  return Table('Groups', header, rows, note)


def _runs(value: Mapping[str, Any]) -> Table:
  rows = [
    [
      run['name'],
      run['group'],
      str(run['seed']),
      run['status'],
      f'{run["evaluated_step"]:,}',
      _loss(run['loss']),
      count(run['tokens_per_sec']),
      _size(run['peak_memory_bytes']),
    ]
    for run in value['runs']
  ]
  header = ['run', 'group', 'seed', 'status', 'step', 'loss', 'tokens/s']
  note = (
    f'Loss of the last evaluation, in {value["unit"]}. Memory is the peak of '
    'the first device, or of the process on a CPU.'
  )
  return Table('Runs', [*header, 'memory'], rows, note)


def _losses(value: Mapping[str, Any]) -> Table:
  equal = value['equal']
  axes = [axis for axis in AXES if equal[axis]['point'] is not None]
  rows = []
  for group in value['groups']:
    cells = [equal[axis]['groups'].get(group['name']) for axis in axes]
    if any(cells):
      rows.append([group['name'], *map(_spread, cells)])
  notes = [
    f'Validation loss in {value["unit"]}: mean ± standard deviation of the '
    'seeds, linear between two evaluations. FLOPs are those of active experts. '
    'Seconds exclude compilation, evaluation and checkpoints.'
  ]
  reasons: dict[str, list[str]] = {}
  for axis in AXES:
    if reason := equal[axis]['reason']:
      reasons.setdefault(reason, []).append(LABELS[axis])
  notes += [
    f'No loss at equal {", ".join(of)}: {reason}.'
    for reason, of in reasons.items()
  ]
  notes += [
    f'{", ".join(equal[axis]["without"])}: no recorded {LABELS[axis]}.'
    for axis in axes
    if equal[axis]['without']
  ]
  return Table(
    'Validation loss at equal steps, tokens, training FLOPs and seconds',
    ['group', *(point(equal[axis]) for axis in axes)],
    rows or [['none']],
    ' '.join(notes),
  )


def _differences(value: Mapping[str, Any]) -> Table:
  first = value['groups'][0]['name']
  rows, has_interval, lacks_interval = [], False, False
  for group in value['groups'][1:]:
    for axis in AXES:
      equal = value['equal'][axis]
      found = equal['differences'].get(group['name'])
      if not found:
        continue
      is_interval = found['low'] is not None
      has_interval |= is_interval
      lacks_interval |= not is_interval
      rows.append(
        [
          f'{group["name"]} - {first}',
          point(equal),
          _signed(found['mean']),
          f'{_signed(found["low"])} to {_signed(found["high"])}'
          if is_interval
          else 'none',
          str(found['num_pairs']),
        ]
      )
  share = f'{value["confidence"]:.0%}'
  notes = ['Differences are paired by seed; a negative one is a lower loss.']
  if has_interval:
    notes.append(value['assumption'])
  if lacks_interval:
    notes.append('An interval needs at least two common seeds.')
  return Table(
    f'Difference from group {first}',
    ['groups', 'at equal', 'difference', f'{share} interval', 'pairs'],
    rows,
    ' '.join(notes),
  )


def point(equal: Mapping[str, Any]) -> str:
  """Returns the equal point of an axis with its unit, such as '18.2G FLOPs'."""
  number = equal['point']
  if equal['unit'] == 's':
    return f'{number:.3g} s' if number < 1000 else f'{number:,.0f} s'
  if equal['unit'] == 'steps':
    return f'{number:,.0f} steps'
  return f'{count(number)} {equal["unit"]}'


def _text(found: Sequence[Table], width: int) -> str:
  # Rich takes 0.1 s to import.
  from rich import box  # noqa: PLC0415
  from rich.console import Console  # noqa: PLC0415
  from rich.table import Table as RichTable  # noqa: PLC0415
  from rich.text import Text  # noqa: PLC0415

  file = io.StringIO()
  console = Console(file=file, width=width, color_system=None)
  for table in found:
    console.print(Text(table.title))
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in table.header:
      drawn.add_column(Text(name), overflow='fold')
    for row in table.rows:
      drawn.add_row(*map(Text, row))
    console.print(drawn)
    if table.note:
      console.print(Text(table.note))
    console.print()
  lines = [line.rstrip() for line in file.getvalue().splitlines()]
  return '\n'.join(lines).rstrip() + '\n'


def _markdown(table: Table) -> str:
  lines = [table.header, ['---'] * len(table.header), *table.rows]
  body = '\n'.join(
    f'| {" | ".join(_markdown_cell(cell) for cell in line)} |' for line in lines
  )
  note = f'\n{table.note}\n' if table.note else ''
  return f'### {table.title}\n\n{body}\n{note}'


def _markdown_cell(text: str) -> str:
  text = html.escape(text, quote=False)
  return text.replace('|', '\\|').replace('\n', '<br>')


def _csv(value: Mapping[str, Any]) -> str:
  """Returns a row per compared run."""
  configs = {group['name']: group['config'] for group in value['groups']}
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  at_equal = [f'loss_at_equal_{axis}' for axis in AXES]
  points = [f'equal_{axis}' for axis in AXES]
  writer.writerow([*_COLUMNS, *points, *at_equal, *value['keys']])
  for run in value['runs']:
    config = configs[run['group']]
    writer.writerow(
      [
        *({**run, 'unit': value['unit']}[column] for column in _COLUMNS),
        *(value['equal'][axis]['point'] for axis in AXES),
        *(run['equal'][axis] for axis in AXES),
        *(config[key] for key in value['keys']),
      ]
    )
  return file.getvalue()


def _spread(found: Mapping[str, Any] | None) -> str:
  if not found:
    return _MISSING
  if found['std'] is None:
    return _loss(found['mean'])
  return f'{found["mean"]:.4f} ± {found["std"]:.4f}'


def _loss(number: float | int | None) -> str:
  return _MISSING if number is None else f'{number:.4f}'


def _signed(number: float | int | None) -> str:
  return _MISSING if number is None else f'{number:+.4f}'


def count(number: float | int | None) -> str:
  """Returns a number with three digits and a unit, such as '18.2G'."""
  if number is None:
    return _MISSING
  for unit in ('', 'k', 'M', 'G', 'T', 'P', 'E'):
    if abs(number) < 999.5 or unit == 'E':
      break
    number /= 1000
  return f'{number:.3g}{unit}'


def _size(number: float | int | None) -> str:
  return _MISSING if number is None else hardware.shown(number)


def _shown(value: Any) -> str:
  return 'missing' if value is None else str(value)
