"""The notebooks: whole as committed, and executed in a real kernel."""

import configparser
import json
import subprocess

import pytest

from benchmarks import peers
from tests.shrunk import ROOT

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
MAX_BYTES = 100_000


def _code(path) -> list[dict]:
  cells = json.loads(path.read_text())['cells']
  return [cell for cell in cells if cell['cell_type'] == 'code']


def _kinds(cell) -> list[str]:
  """Returns the kinds of a cell's outputs."""
  outputs = cell['outputs']
  return sorted({o.get('ename') or o['output_type'] for o in outputs})


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_executed_in_order(path):
  cells = _code(path)
  counts = [cell['execution_count'] for cell in cells]
  assert counts == list(range(1, len(cells) + 1))
  errors = {kind for cell in cells for kind in _kinds(cell) if 'Err' in kind}
  assert errors <= {'UserError'}
  assert path.stat().st_size < MAX_BYTES
  assert str(ROOT) not in path.read_text()


def test_there_are_three_and_the_guide_names_them():
  text = (ROOT / 'docs' / 'guides' / 'notebooks.md').read_text()
  assert len(NOTEBOOKS) == 3
  assert all(path.name in text for path in NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
  options = configparser.ConfigParser()
  options.read(ROOT / 'setup.cfg')
  ours = options['options']['install_requires'].split('\n')[1:]
  requirements = ['ipykernel', 'nbclient', 'pandas', 'matplotlib', *ours]
  python = peers.python_with('notebooks', requirements)
  script = ROOT / 'tests' / 'reference' / 'run_notebook.py'
  output = tmp_path / 'output.ipynb'
  process = subprocess.run(
    [python, script, path, tmp_path, output],
    env=peers.environment(ours=True),
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr[-3000:]
  for found, committed in zip(_code(output), _code(path), strict=True):
    assert found['source'] == committed['source']
    assert _kinds(found) == _kinds(committed), found['source']
