"""Page of a comparison: one HTML file without external references."""

from collections.abc import Iterator, Mapping
import html
import math
from typing import Any

from nanomoe.comparison import tables
from nanomoe.comparison.curves import AXES, LABELS
from nanomoe.comparison.plot import COLORS, axes_of, label

# Size of a figure in user units, and its margins: left, top, right, bottom.
_WIDTH, _HEIGHT = 420, 280
_MARGINS = 52, 10, 12, 40
_NUM_TICKS = 5
_DASHES = ('', '6 3', '2 2', '8 3 2 3')
_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --paper: #fff;
  --faint: #d5d9de; --dim: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb;
  --paper: #14171a; --faint: #363c43; --dim: #9aa4ae; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; color: var(--text);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--dim); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--faint); } .equal { stroke: var(--dim);
  stroke-dasharray: 2 3; }
.line { fill: none; stroke-width: 1.5; } .legend { list-style: none;
  padding: 0; margin: .5rem 0 1rem; }
.legend svg { width: 2rem; height: .7rem; display: inline-block;
  margin-right: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .9rem .25rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--faint);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
td:last-child { white-space: pre-line; }
th { color: var(--dim); font-weight: 600; }
.note { color: var(--dim); font-size: .9rem; max-width: 44rem; }
"""


def render(value: Mapping[str, Any]) -> str:
  """Returns the page of a comparison, as of `summary.make`."""
  num_runs, num_groups = len(value['runs']), len(value['groups'])
  styles = _styles(value)
  return '\n'.join(
    [
      '<!DOCTYPE html>',
      '<html lang="en"><head><meta charset="utf-8">',
      '<meta name="viewport" content="width=device-width, initial-scale=1">',
      f'<title>Comparison of {num_runs} runs</title>',
      f'<style>{_STYLE}</style></head><body>',
      f'<h1>Comparison of {num_runs} runs in {num_groups} groups</h1>',
      f'<ul class="legend">{_legend(value, styles)}</ul>',
      '<div class="figures">',
      *(_figure(value, axis, styles) for axis in axes_of(value)),
      '</div>',
      f'<p class="note">Validation loss in {html.escape(value["unit"])}, a '
      'line per run. The dotted line is the equal point. A pointer on an '
      'evaluation shows its values.</p>',
      *map(_table, tables.tables(value)),
      '</body></html>\n',
    ]
  )


def _styles(value: Mapping[str, Any]) -> dict[str, str]:
  """Returns the attributes of the lines of each group."""
  styles = {}
  for index, group in enumerate(value['groups']):
    color = COLORS[index % len(COLORS)]
    dashes = _DASHES[index // len(COLORS) % len(_DASHES)]
    styles[group['name']] = f'stroke="{color}" stroke-dasharray="{dashes}"'
  return styles


def _legend(value: Mapping[str, Any], styles: Mapping[str, str]) -> str:
  return ''.join(
    f'<li><svg viewBox="0 0 32 8"><line x2="32" y1="4" y2="4" '
    f'stroke-width="3" {styles[group["name"]]}/></svg>'
    f'{html.escape(label(group))}</li>'
    for group in value['groups']
  )


def _figure(
  value: Mapping[str, Any], axis: str, styles: Mapping[str, str]
) -> str:
  """Returns the figure of the losses along an axis."""
  runs = [run for run in value['runs'] if run['curves'][axis]]
  positions = [x for run in runs for x in run['curves'][axis]['positions']]
  losses = [y for run in runs for y in run['curves'][axis]['losses']]
  left, top, right, bottom = _MARGINS
  low, high = _padded(min(losses), max(losses))
  end = max(positions) or 1.0

  def at(x: float) -> float:
    return left + x / end * (_WIDTH - left - right)

  def up(y: float) -> float:
    return top + (high - y) / (high - low) * (_HEIGHT - top - bottom)

  parts = []
  for tick in _ticks(low, high):
    parts.append(
      f'<line class="axis" x1="{left}" x2="{_WIDTH - right}" '
      f'y1="{up(tick):.1f}" y2="{up(tick):.1f}"/><text text-anchor="end" '
      f'x="{left - 6}" y="{up(tick) + 4:.1f}">{tick:.4g}</text>'
    )
  for tick in _ticks(0.0, end):
    parts.append(
      f'<text text-anchor="middle" x="{at(tick):.1f}" '
      f'y="{_HEIGHT - bottom + 16}">{tables.count(tick)}</text>'
    )
  parts.append(
    f'<text text-anchor="middle" x="{(left + _WIDTH - right) / 2}" '
    f'y="{_HEIGHT - 4}">{LABELS[axis]}</text>'
  )
  if (equal := value['equal'][axis]['point']) is not None:
    parts.append(
      f'<line class="equal" x1="{at(equal):.1f}" x2="{at(equal):.1f}" '
      f'y1="{top}" y2="{_HEIGHT - bottom}"/>'
    )
  for run in runs:
    curve = run['curves'][axis]
    points = list(zip(curve['positions'], curve['losses'], strict=True))
    line = ' '.join(f'{at(x):.1f},{up(y):.1f}' for x, y in points)
    style = styles[run['group']]
    parts.append(f'<polyline class="line" {style} points="{line}"/>')
    name = html.escape(run['name'])
    for x, y in points:
      parts.append(
        f'<circle cx="{at(x):.1f}" cy="{up(y):.1f}" r="5" '
        f'fill="transparent"><title>{name}: {y:.4f} at {tables.count(x)} '
        f'{AXES[axis]}</title></circle>'
      )
  return (
    f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="Validation loss against {LABELS[axis]}">{"".join(parts)}'
    '</svg></figure>'
  )


def _padded(low: float, high: float) -> tuple[float, float]:
  """Returns a range that is a little larger, and never empty."""
  pad = 0.05 * (high - low) or 0.5
  return low - pad, high + pad


def _ticks(low: float, high: float) -> Iterator[float]:
  """Yields round numbers of a range."""
  rough = (high - low) / _NUM_TICKS
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
  for number in range(math.ceil(low / step), math.floor(high / step) + 1):
    yield number * step


def _table(table: tables.Table) -> str:
  head = ''.join(f'<th>{html.escape(cell)}</th>' for cell in table.header)
  rows = ''.join(
    '<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in row) + '</tr>'
    for row in table.rows
  )
  note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ''
  return (
    f'<h2>{html.escape(table.title)}</h2><div class="scroll"><table><thead>'
    f'<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'
  )
