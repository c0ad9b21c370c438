"""The documents' figures are those of the files."""

import pytest

from benchmarks import report
from tests.shrunk import ROOT


@pytest.mark.parametrize(
  ('document', 'name'),
  [(document, name) for document, t in report.TABLES.items() for name in t],
)
def test_a_table_is_what_the_script_makes(document, name):
  made = report.TABLES[document][name]()
  assert made
  text = (ROOT / document).read_text()
  assert f'<!-- {name} -->\n{made}\n<!-- /{name} -->' in text
