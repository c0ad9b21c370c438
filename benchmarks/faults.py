"""python -m benchmarks.faults [--only=WORD]

Runs tests/faults, the slow ones too, and writes what was injected, promised and
seen to benchmarks/results/faults.json; then makes the table of docs/faults.md
anew, between its two markers. With --table_only, from the file as it is.
"""

import pathlib
import re
import textwrap
from typing import Any

from absl import app, flags
import pytest

from benchmarks import results

_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Runs nothing.')
_ONLY = flags.DEFINE_string(
  'only', '', "Files or tests, as pytest's -k; the others stay as they were."
)

_WORKERS = flags.DEFINE_integer(
  'workers', 2, 'Processes of pytest; 0 runs one test after the other.'
)

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs' / 'faults.md'
CELL = 100  # Characters; markup and a number of cases come on top.
MARKERS = '<!-- faults -->', '<!-- /faults -->'

# Files of tests/faults, and what they are about, in the order of the table.
SECTIONS = {
  'test_stopping': 'Stopping',
  'test_checkpoints': 'Checkpoints',
  'test_going_on': 'Resuming',
  'test_numbers': 'Numbers',
  'test_callbacks': 'Callbacks',
  'test_writers': 'Writers',
  'test_input': 'Texts, prompts, directories and files of a run',
  'test_config_misuse': 'Config',
  'test_strangers': 'Runs of other people',
  'test_determinism': 'Determinism and leaks',
  'test_processes': 'Processes of one run',
  'test_process_starts': 'Processes that start together',
  'test_process_checkpoints': 'Checkpoints of several processes',
  'test_reported_tokenizers': 'Tokenizer files and long words',
  'test_reported_texts': 'Byte order marks and short texts',
  'test_reported_paths': 'Paths, links and directories',
  'test_reported_numbers': 'Numbers of flags and config keys',
  'test_reported_output': 'Outputs that are closed or full',
  'test_reported_restart': 'Commands inside other programs',
  'test_reported_signals': 'Signals of terminals and batch systems',
  'test_reported_environment': 'Environment variables that JAX cannot use',
  'test_reported_jax': 'Settings of JAX',
  'test_reported_memory': 'Limits of memory',
  'test_reported_schedules': 'Learning rates',
  'test_reported_clock': 'Clocks that move',
  'test_reported_rotation': 'Reading while checkpoints rotate',
}


class Collector:
  """A plug-in of pytest: what each test with a `fault` mark says of itself."""

  def __init__(self):
    self.cases: dict[str, dict[str, Any]] = {}

  def pytest_runtest_logreport(self, report) -> None:
    words = dict(report.user_properties)
    if 'injected' not in words:
      return
    case = self.cases.setdefault(
      report.nodeid, {'seconds': 0.0, 'outcome': 'passed'}
    )
    case['seconds'] = round(case['seconds'] + report.duration, 2)
    case.update({k: words.get(k, '') for k in ('injected', 'promised')})
    case['happened'] = lasting(words.get('happened', ''))
    if 'gone' in words:
      case['gone'] = words['gone']
    if 'reported' in words:
      case['reported'] = words['reported']
    if report.outcome != 'passed':
      case['outcome'] = report.outcome


def lasting(text: str) -> str:
  """Without what differs from one run of the tests to the next."""
  return re.sub(r'/\S*?pytest-of-[^/]+/pytest-\d+/[^/\s]+/?', '.../', text)


def run(only: str) -> dict[str, dict[str, Any]]:
  """The cases, by the name of their test."""
  collector = Collector()
  words = ['-o', 'addopts=', '-q', '-n', str(_WORKERS.value)]
  words += ['--dist', 'loadfile'] if _WORKERS.value else []
  words += ['-p', 'no:cacheprovider']
  words += ['-k', only] if only else []
  pytest.main([*words, str(ROOT / 'tests' / 'faults')], plugins=[collector])
  return collector.cases


def table(figures: dict[str, Any]) -> str:
  """Markdown: a table for each section; equal rows are one."""
  cases = figures['cases']
  passed = sum(case['outcome'] == 'passed' for case in cases.values())
  parts = [
    f'{passed} of {len(cases)} cases hold, in '
    f'{sum(case["seconds"] for case in cases.values()) / 60:.0f} minutes; '
    f'{results.describe(figures["machine"])}'
  ]
  for file, title in SECTIONS.items():
    own = [case for name, case in cases.items() if f'/{file}.py::' in name]
    if not own:
      continue
    head = _GONE if any('gone' in case for case in own) else _HEAD
    parts += [f'### {title}', '\n'.join([*head, *_rows(own)])]
  return '\n\n'.join(parts)


_HEAD = (
  '| injected | promised | happened | s |',
  '|---|---|---|---:|',
)
# Tables of several processes.
_GONE = (
  '| injected | promised | happened | s until all were gone |',
  '|---|---|---|---:|',
)


def _rows(cases: list[dict[str, Any]]) -> list[str]:
  """Of cases that differ in nothing that is shown, one, with their number."""
  groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
  for case in cases:
    said = case['happened'] or 'as promised'
    happened = said if case['outcome'] == 'passed' else case['outcome'].upper()
    key = (case['injected'], case['promised'], happened)
    groups.setdefault(key, []).append(case)
  return [
    f'| {" | ".join(map(_cell, key))}'
    f'{f" ({len(same)} cases)" if len(same) > 1 else ""} | {_seconds(same)} |'
    for key, same in groups.items()
  ]


def _seconds(cases: list[dict[str, Any]]) -> str:
  """Returns the sum of the tests, or the longest until all were gone."""
  if any('gone' in case for case in cases):
    return f'{max(case.get("gone", 0.0) for case in cases):.1f}'
  return f'{sum(case["seconds"] for case in cases):.1f}'


def _cell(text: str) -> str:
  """Returns one line of Markdown, at most `CELL` characters as it is read."""
  text = ' '.join(text.encode(errors='backslashreplace').decode().split())
  text = textwrap.shorten(text, CELL, placeholder=' ...')
  return text.replace('|', '\\|').replace('<', '&lt;').replace('*', '\\*')


def main(_: list[str]) -> None:
  figures = results.read('faults') or {'cases': {}}
  if not _TABLE_ONLY.value:
    cases = run(_ONLY.value)
    old = figures['cases'] if _ONLY.value else {}
    results.write('faults', {'cases': {**old, **cases}})
    figures = results.read('faults') or figures
  text = DOCS.read_text()
  before, _, rest = text.partition(MARKERS[0])
  _, _, after = rest.partition(MARKERS[1])
  DOCS.write_text(
    f'{before}{MARKERS[0]}\n{table(figures)}\n{MARKERS[1]}{after}'
  )


if __name__ == '__main__':
  app.run(main)
