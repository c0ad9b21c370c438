"""The table of faults is what the script makes of the figures."""

from benchmarks import faults, results
from tests.shrunk import ROOT


def test_the_table_is_of_the_figures():
  figures = results.read('faults')
  text = (ROOT / 'docs' / 'faults.md').read_text()
  first, last = faults.MARKERS
  assert f'{first}\n{faults.table(figures)}\n{last}' in text
  assert len(figures['cases']) >= 50
  bad = [n for n, c in figures['cases'].items() if c['outcome'] == 'failed']
  assert bad == []


def test_rows_are_escaped_and_joined():
  case = {
    'injected': 'a | b',
    'promised': '*',
    'happened': faults.lasting('/any/pytest-of-me/pytest-3/x0/run is <b>\n'),
    'outcome': 'passed',
    'seconds': 1.25,
  }
  failed = {**case, 'outcome': 'failed'}
  assert faults._rows([case, case, failed]) == [
    '| a \\| b | \\* | .../run is &lt;b> (2 cases) | 2.5 |',
    '| a \\| b | \\* | FAILED | 1.2 |',
  ]
