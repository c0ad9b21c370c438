"""README's figures are those of the files."""

import pytest

from benchmarks import report
from tests.shrunk import ROOT


@pytest.mark.parametrize('name', report.TABLES)
def test_a_table_is_what_the_script_makes(name):
  made = report.TABLES[name]()
  assert made
  readme = (ROOT / 'README.md').read_text()
  assert f'<!-- {name} -->\n{made}\n<!-- /{name} -->' in readme
