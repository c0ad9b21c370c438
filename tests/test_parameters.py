"""The table of parameter kinds: complete, without overlap, with known kinds."""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import pytest

from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.model import parameters
from tests.routed import VARIANTS
from tests.shrunk import MODERN, mostly_slow
from tests.test_architecture import CONFIGS

SHARED = {'moe.num_shared': 1}
CHOICES = {
  'modern': MODERN,
  'shared': SHARED,
  'stacked': {**MODERN, 'model.num_layers': 3, 'model.scan_layers': True},
  'modern_shared': {**MODERN, **SHARED, 'model.bias': True},
  **{
    f'{name}_shared': {**SHARED, 'moe.router.type': router}
    for name, (router, _) in VARIANTS.items()
  },
}


def _params(config):
  """Returns the parameters of a config, as shapes by path."""
  return _params_of(config.to_json_best_effort())


@functools.cache
def _params_of(text):
  config = experiment.resolve_auto(ConfigDict(json.loads(text)))
  task = experiment.build_task(config, 65)
  batch = {'inputs': jnp.zeros((1, config.block_size), jnp.int32)}
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _of_config(name):
  module = importlib.import_module(f'configs.{name}')
  return config_lib.apply(module.get_config(), [])


def _assert_kinds_by_name(params, config):
  """Asserts what names alone say of the parameters of this package."""
  for path, leaf in params.items():
    kind = parameters.kind_of(path, leaf.ndim)
    assert kind in parameters.KINDS, path  # It is no plug-in's.
    name = path.split('/')[-1]
    other = name.startswith('b_') or 'embedding' in name or name == 'filter'
    shape = leaf.shape[path.startswith('blocks/') :]
    is_matrix = len(shape) >= 2 and not other
    assert kind.is_matrix == is_matrix, path
    assert kind.is_hidden == (is_matrix and path != 'head/kernel'), path
    if kind.active == 'top_k':
      assert shape[0] == config.moe.num_experts, path


@pytest.mark.parametrize('name', mostly_slow(CONFIGS, 'base', 'gpu_1b'))
def test_every_parameter_of_a_config_has_one_kind(name):
  config = _of_config(name)
  _assert_kinds_by_name(_params(config), config)


@pytest.mark.parametrize('choices', CHOICES)
def test_every_parameter_of_the_choices_has_one_kind(choices, tiny):
  config = tiny(CHOICES[choices])
  _assert_kinds_by_name(_params(config), config)


def test_every_row_is_of_some_parameter(tiny):
  found = set()
  for changes in ({}, *CHOICES.values()):
    for path, leaf in _params(tiny(changes)).items():
      found.add(parameters.kind_of(path, leaf.ndim))
  assert found == set(parameters.KINDS)


@pytest.mark.parametrize(
  'path',
  [
    'block_0/attention_gate/kernel',
    'block_0/moe/w_up',
    'block_0/feed_forward/scale',
    'block_0/moe',
    'heads/kernel',
    'kernel',
    '',
  ],
)
def test_a_parameter_without_a_row_is_an_error(path):
  with pytest.raises(ValueError, match=repr(path)):
    parameters.kind_of(path, 2)


def test_a_parameter_of_two_rows_is_an_error(monkeypatch):
  double = (*parameters.KINDS, parameters.Kind(r'head/.*'))
  monkeypatch.setattr(parameters, 'KINDS', double)
  with pytest.raises(ValueError, match='head/kernel'):
    parameters.kind_of('head/kernel', 2)


def test_a_run_with_an_unknown_parameter_does_not_start(
  tiny, tmp_path, monkeypatch
):
  rows = [k for k in parameters.KINDS if 'convolution' not in k.pattern]
  monkeypatch.setattr(parameters, 'KINDS', rows)
  with pytest.raises(ValueError, match='attention_convolution/filter'):
    experiment.build(tiny({'model.conv_width': 2}), tmp_path)


@pytest.mark.parametrize(
  ('path', 'num_axes', 'is_matrix'),
  [
    ('block_3/attention/query/kernel', 2, True),
    ('block_3/attention/query/kernel', 3, True),
    ('block_3/attention/query/bias', 1, False),
    ('block_3/attention/sink_embedding', 2, False),
    ('block_3/attention/filter', 2, False),
    ('block_3/Window_0/query/kernel', 2, True),
    ('block_3/moe/router/centroids', 2, True),
    ('block_3/moe/router/deep/er/b_in', 2, False),
    ('block_3/feed_forward/moe/router/centroids', 2, True),
    ('block_3/feed_forward/moe/Tempered_0/kernel', 2, True),
    ('block_3/moe/router/temperature', 0, False),
    ('blocks/block_1/moe/router/temperature', 1, False),
    ('blocks/block_1/attention/query/bias', 2, False),
    ('blocks/block_1/attention/query/kernel', 3, True),
  ],
)
def test_parameters_of_plug_ins_are_known_by_their_axes(
  path, num_axes, is_matrix
):
  kind = parameters.kind_of(path, num_axes)
  assert (kind.is_matrix, kind.is_hidden) == (is_matrix, is_matrix)
  assert kind.active == 'all'


def test_active_parameters_by_hand():
  params = {
    'token_embedding': jnp.zeros((65, 8)),
    'ngrams': {'ngram_2_embedding': jnp.zeros((100, 8))},
    'block_0': {
      'moe': {'w_in': jnp.zeros((5, 8, 3)), 'b_in': jnp.zeros((5, 3))}
    },
    'blocks': {'block_0': {'moe': {'w_in': jnp.zeros((7, 5, 8, 3))}}},
  }
  expert = 8 * 3 + 3
  assert parameters.count(params, top_k=2) == {
    'num_params': 65 * 8 + 100 * 8 + 5 * expert + 7 * 5 * 8 * 3,
    'num_active_params': 65 * 8 + 8 + 2 * expert + 7 * 2 * 8 * 3,
  }
