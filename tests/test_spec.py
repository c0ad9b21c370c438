"""Config specs: what they build, and what a mistake in one says."""

import fractions

import pytest

from trainers import spec
from trainers.errors import UserError


class Router:
  def __init__(self, num_experts, top_k=2, *, noise=0.0):
    self.values = (num_experts, top_k, noise)


def anything(**kwargs):
  return kwargs


TABLE = {'Router': Router, 'Random': Router, 'anything': anything}


def problems(spec_, **context) -> list[str]:
  with pytest.raises(UserError) as error:
    spec.build('moe.router', spec_, TABLE, **context)
  return error.value.problems


def test_a_bare_name_is_of_the_table():
  router = spec.build('r', {'type': 'Router', 'num_experts': 4}, TABLE)
  assert type(router) is Router
  assert router.values == (4, 2, 0.0)


def test_a_dotted_name_is_imported():
  built = spec.build(
    'r', {'type': 'fractions.Fraction', 'numerator': 6, 'denominator': 4}, {}
  )
  assert built == fractions.Fraction(3, 2)


def test_context_goes_to_what_takes_it_and_the_spec_wins():
  router = spec.build(
    'r', {'type': 'Router', 'top_k': 1}, TABLE, num_experts=8, top_k=3, other=0
  )
  assert router.values == (8, 1, 0.0)


def test_a_target_may_take_anything():
  assert spec.build('r', {'type': 'anything', 'a': 1}, TABLE) == {'a': 1}


def test_an_unknown_type_is_told_with_what_there_is():
  (line,) = problems({'type': 'Ruoter'})
  assert 'moe.router' in line
  assert "'Ruoter'" in line
  assert "Did you mean 'Router'?" in line
  for name in TABLE:
    assert name in line


def test_nothing_near_is_suggested_when_nothing_is_near():
  (line,) = problems({'type': 'xyz'})
  assert 'Did you mean' not in line


def test_an_unknown_argument_is_told_with_the_nearest():
  lines = problems({'type': 'Router', 'num_experts': 4, 'topk': 1, 'nois': 2})
  assert len(lines) == 2
  assert 'moe.router.topk' in lines[0]
  assert "Did you mean 'top_k'?" in lines[0]
  assert 'moe.router.nois' in lines[1]
  assert "Did you mean 'noise'?" in lines[1]


def test_a_missing_argument_is_told():
  (line,) = problems({'type': 'Router'})
  assert 'moe.router.num_experts' in line


def test_all_mistakes_are_told_at_once():
  lines = problems({'type': 'Router', 'num_expert': 4})
  assert len(lines) == 2
  assert "Did you mean 'num_experts'?" in lines[0]


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('no_such_module_at_all.Thing', ['no_such_module_at_all']),
    ('fractions.Fractoin', ['fractions', "Did you mean 'fractions.Fraction'?"]),
    ('fractions.no.such', ['fractions.no']),
    ('math.pi', []),  # There, but nothing that can be called.
    ('.Thing', []),
    ('Thing.', []),
    ('', []),
  ],
)
def test_a_wrong_import_path_is_told(name, words):
  (line,) = problems({'type': name})
  for word in ['moe.router', repr(name), *words]:
    assert word in line


def test_a_missing_type_is_told():
  (line,) = problems({'num_experts': 4})
  assert 'moe.router' in line
  assert 'type' in line


def test_a_name_of_the_table_that_builds_nothing_is_told():
  """`vars(package)` is a table: it holds submodules too."""
  with pytest.raises(UserError) as error:
    spec.build('callbacks.x', {'type': 'sub'}, {'sub': pytest})
  assert 'callbacks.x' in str(error.value)
