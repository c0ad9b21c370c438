"""The documents are those of the code, and short enough."""

import re
import runpy
import types

import pytest

from benchmarks import faults, results
from nanomoe import console, main
from nanomoe.config import schema
from tests.shrunk import ROOT


@pytest.fixture(scope='module')
def reference():
  return types.SimpleNamespace(
    **runpy.run_path(str(ROOT / 'docs/reference.py'))
  )


@pytest.fixture(scope='module')
def pages(reference):
  return {path: page.text for path, page in reference.pages().items()}


def test_every_config_key_has_a_row(pages):
  keys = [*schema.FIELDS, *schema.ARGUMENTS]
  keys += [f'{key}.type' for key in schema.SPECS]
  rows = pages['reference/config.md'].splitlines()
  for key in keys:
    assert sum(row.startswith(f'| `{key}` |') for row in rows) == 1, key


def test_a_key_says_what_a_resumed_run_may_do(pages):
  rows = {
    row.split('`')[1]: row.split(' | ')[-1].removesuffix(' |')
    for row in pages['reference/config.md'].splitlines()
    if row.startswith('| `')
  }
  assert rows['model.d_model'] == 'no'
  assert rows['log_interval'] == 'yes'
  assert rows['optimizer.learning_rate'] == 'by name'
  assert rows['seed'] == '`--allow_changed=seed`'


def test_every_exit_code_has_a_row(pages):
  for status, code in main.EXIT_CODES.items():
    assert f'| {code} | `{status}` |' in pages['reference/exit_codes.md']


@pytest.mark.parametrize('flag', ['--workdir', '--prompt', '--allow_changed'])
def test_flags_have_rows(pages, flag):
  assert f'`{flag}` |' in pages['reference/commands.md']


def test_every_command_has_a_row(pages):
  for name in (*console.COMMANDS, 'list', 'completion'):
    assert f'\n  {name} ' in pages['reference/commands.md']


@pytest.mark.parametrize('number', [1, 2, 10, 12, 15])
def test_the_code_of_a_second_signal_has_a_row(pages, number):
  assert f'\n| {128 + number} |  |' in pages['reference/exit_codes.md']


def test_every_table_of_names_that_a_command_lists_has_a_section(reference):
  listed = {table for table in console.TABLES.values()}
  assert listed <= set(reference.NAMES.values())


def test_every_public_module_has_a_page(pages):
  for package in ('nanomoe', 'trainers'):
    for path in (ROOT / package).rglob('*.py'):
      parts = path.relative_to(ROOT).with_suffix('').parts
      if not path.stem.startswith('__'):
        assert f'reference/api/{".".join(parts)}.md' in pages


def test_every_page_is_in_the_navigation(reference):
  """mkdocs.yml names every file of docs/ and every generated page."""
  text = (ROOT / 'mkdocs.yml').read_text()
  pages = [
    path.relative_to(ROOT / 'docs').as_posix()
    for path in (ROOT / 'docs').rglob('*.md')
  ]
  pages += [p for p in reference.pages() if not p.startswith('reference/api/')]
  for page in pages:
    assert re.search(rf': {re.escape(page)}$', text, re.MULTILINE), page


def test_the_site_asks_no_other_host():
  text = (ROOT / 'mkdocs.yml').read_text()
  assert 'font: false' in text
  assert 'http' not in text


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_the_tree_of_modules_is_that_of_the_folders():
  """BUILD.md names each module, and no other in its lists of folders."""
  tree = (ROOT / 'BUILD.md').read_text().partition('## Where each thing lives')
  for package in ('nanomoe', 'trainers'):
    (block,) = re.findall(
      rf'^    {package}/.*\n((?: {{6}}.*\n)+)', tree[2], re.M
    )
    folders = [ROOT / package, *(ROOT / package).rglob('*/')]
    for folder in folders:
      modules = {p.stem for p in folder.glob('*.py')} - {'__init__'}
      if folder == ROOT / package:
        assert modules <= set(re.findall(r'\w+', block))
      elif modules:
        listed = rf'^ +{folder.name}/ +((?:.*,\n)*.*)$'
        (names,) = re.findall(listed, block, re.M)
        assert set(re.findall(r'\w+', names)) == modules


def test_no_cell_of_the_table_of_faults_is_long():
  cells = [
    cell.strip()
    for line in (ROOT / 'docs' / 'faults.md').read_text().splitlines()
    if line.startswith('|')
    for cell in line.replace('\\|', '').split('|')
  ]
  assert max(map(len, cells)) <= 120


def test_the_table_of_faults_is_what_the_script_makes():
  table = faults.table(results.read('faults') or {})
  assert table in (ROOT / 'docs' / 'faults.md').read_text()


def test_the_versions_are_those_of_the_results():
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  for name in ('base', 'quick', 'quick_top1'):
    versions = (results.read(name) or {})['result']['versions']
    for package in set(versions) - {'python', 'nanomoe'}:
      assert f'{package}=={versions[package]}' in lines


def test_the_regression_of_the_guide_is_learned():
  text = (ROOT / 'docs' / 'guides' / 'trainer.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  names: dict = {}
  exec(code, names)
  assert names['trainer'].best.value < 0.1
