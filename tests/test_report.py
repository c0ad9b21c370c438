"""The documents' figures are those of the files."""

import pytest

from benchmarks import config_runs, recipe, report, results
from tests.shrunk import ROOT

CONFIGS = sorted(
  path.name
  for path in (ROOT / 'configs').glob('*.py')
  if path.stem != '__init__'
)


@pytest.mark.parametrize(
  'document, name',
  [(d, name) for d, tables in report.TABLES.items() for name in tables],
)
def test_a_table_is_what_the_script_makes(document, name):
  made = report.TABLES[document][name]() or ''
  text = (ROOT / document).read_text()
  assert f'<!-- {name} -->\n{made}\n<!-- /{name} -->' in text


@pytest.mark.parametrize('name', report.numbers())
def test_a_number_of_the_readme_is_what_the_script_makes(name):
  text = (ROOT / 'README.md').read_text()
  assert f'<!-- {name} -->{report.numbers()[name]}<!-- /{name} -->' in text


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_says_what_it_gave(name):
  line = report.measured(f'configs/{name}')
  text = (ROOT / 'configs' / name).read_text()
  assert f'\n{line}\n' in text.split('"""')[1]
  assert text.count('Measured:') == 1


def test_the_line_of_a_config_is_of_its_run(monkeypatch):
  run = {
    'config': 'configs/dense.py',
    'result': {
      'step': 1500,
      'best_val_loss': 1.75,
      'seconds_by_phase': {'train': 170.0, 'evaluate': 10.0},
    },
  }
  read = {'config_runs': {'runs': {'dense': run}}}
  monkeypatch.setattr(results, 'read', read.get)
  assert report.measured('configs/dense.py') == (
    'Measured: val cross-entropy 1.7500, 1500 steps in 3 minutes on 2 cores.'
  )
  assert report.measured('configs/base.py') == 'Measured: not yet.'


def test_every_config_is_run_by_a_script():
  commands = [
    *report.RUNS.values(),
    *(r.config for r in config_runs.RUNS.values()),
    *(r.config for r in recipe.RUNS.values()),
  ]
  # Configs for GPUs have not been trained.
  trained = {name for name in CONFIGS if not name.startswith('gpu_')}
  assert {f'configs/{name}' for name in trained} <= set(commands)
