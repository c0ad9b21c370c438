"""The language of docstrings and help: what a linter can check of it."""

import ast

from absl import flags
import pytest

from nanomoe import evaluate, generate, launch, main, plan, sweep
from nanomoe.config import schema
from nanomoe.run import cli
from tests.shrunk import ROOT

# A docstring that begins with one of these words is not a sentence with a
# subject or a verb in the third person.
NO_BEGINNING = {
  *('of', 'in', 'on', 'at', 'by', 'for', 'from', 'to', 'with', 'without'),
  *('as', 'into', 'over', 'under', 'after', 'before', 'between', 'where'),
  *('what', 'who', 'whose', 'which', 'whether', 'how', 'when', 'if', 'than'),
}
PACKAGES = ('nanomoe', 'trainers', 'configs')


def _is_bad(text: str) -> bool:
  return text.split()[0].strip(',:').lower() in NO_BEGINNING


def _docstrings():
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text())):
        kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
          name = getattr(node, 'name', 'module')
          yield f'{path.relative_to(ROOT)}:{name}', text


def test_no_docstring_begins_with_a_preposition():
  found = [
    f'{where}: {text[:60]}' for where, text in _docstrings() if _is_bad(text)
  ]
  assert not found


def test_a_preposition_would_be_found():
  assert _is_bad('Of the run; needed.')
  assert not _is_bad('Directory of the run.')


@pytest.mark.parametrize(
  'module', [main, launch, sweep, evaluate, generate, plan]
)
def test_no_flag_begins_with_a_preposition(module):
  values: flags.FlagValues = module._FLAGS
  texts = {
    flag.name: str(flag.help)
    .removeprefix('<train|val>: ')
    .removeprefix('<text|json>: ')
    for flag in cli.own_flags(values)
  }
  assert texts
  assert not {name for name, text in texts.items() if _is_bad(text)}


def test_no_config_key_begins_with_a_preposition():
  texts = {key: field.meaning for key, field in schema.FIELDS.items()}
  texts |= {key: spec.meaning for key, spec in schema.SPECS.items()}
  texts |= schema.ARGUMENTS
  assert not {key for key, text in texts.items() if _is_bad(text)}
  assert all(text[0].isupper() for text in texts.values())
