"""The transformer: its size, its parts, causality and padding."""

import os
import subprocess

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from nanomoe import experiment
from nanomoe.model import parameters
from nanomoe.model.interfaces import AttentionInputs
from nanomoe.moe import RouterInputs, experts
from nanomoe.moe.losses import BALANCE
from nanomoe.ops.dropout import Dropout
from nanomoe.run import provenance
from tests.shrunk import MODERN, mostly_slow
from trainers.step import Spikes


def _counts(config, vocab_size=65):
  task = experiment.build_task(experiment.resolve_auto(config), vocab_size)
  batch = {'inputs': jnp.zeros((1, config.block_size), jnp.int32)}
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  return parameters.count(params, config.moe.top_k)


def test_the_documented_model_has_2409025_parameters():
  counts = _counts(base.get_config())
  # An expert: 128 * 512 + 512 + 512 * 128 + 128 = 131,712; two idle, 4 layers.
  assert counts == {
    'num_params': 2_409_025,
    'num_active_params': 2_409_025 - 4 * 2 * 131_712,
  }


def test_the_revision_is_not_that_of_a_project_around_us(tmp_path, monkeypatch):
  """An environment may lie inside another repository, for example."""
  for name in [name for name in os.environ if name.startswith('GIT_')]:
    monkeypatch.delenv(name)  # Or it might be the developer's own.
  monkeypatch.setenv('GIT_CONFIG_GLOBAL', os.devnull)
  monkeypatch.setenv('GIT_CONFIG_NOSYSTEM', '1')
  git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e']
  subprocess.run([*git, 'init', '-q'], check=True)
  commit = [*git, 'commit', '-q', '--allow-empty', '-m', 'theirs']
  subprocess.run(commit, check=True)
  module = tmp_path / 'provenance.py'
  module.write_text('')
  monkeypatch.setattr(provenance, '__file__', str(module))
  assert provenance.facts()['revision'] is None
  subprocess.run([*git, 'add', str(module)], check=True)
  assert provenance.facts()['revision'].endswith('+')


def test_parameters_of_the_choices_by_hand():
  config = base.get_config()
  config.model.update(
    {
      'norm': 'RMSNorm',
      'position': 'rope',
      'num_kv_heads': 2,
      'qk_norm': True,
      'max_ngram': 3,
      'bias': False,
      'tie_embeddings': True,
    }
  )
  config.moe.first_dense_layers, config.moe.every = 1, 2
  # q, k, v, out; two norms and two of a head's width.
  block = 128 * (128 + 2 * 64) + 128 * 128 + 2 * 128 + 2 * 32
  dense = 2 * 128 * 1024
  router, expert = 128 * 4, 2 * 128 * 512
  # 66 ** 2 bigrams, hashed trigrams; a token reads one of each.
  tables = (66**2 + 8192) * 128
  rest = 65 * 128 + 128 + 4 * block + 2 * dense + 2 * router  # Layers 2 and 4.
  assert _counts(config) == {
    'num_params': rest + tables + 2 * 4 * expert,
    'num_active_params': rest + 2 * 128 + 2 * 2 * expert,
  }


@pytest.mark.parametrize(
  'first, every, layers',
  [(0, 1, [0, 1, 2, 3]), (1, 1, [1, 2, 3]), (0, 2, [1, 3]), (2, 2, [3])],
)
def test_layers_with_experts_report_alone(tiny, first, every, layers):
  changes = {'moe.first_dense_layers': first, 'moe.every': every}
  config = tiny({**changes, 'model.num_layers': 4, 'moe.dispatch': 'dense'})
  assert experiment.layers_with_experts(config) == layers
  metrics, params = _shapes(config)
  for name in ('expert_load', 'router_entropy'):
    assert metrics[name].total.shape[0] == len(layers)
  for name in ('max_over_mean_load', 'load_entropy', 'dead_experts'):
    assert metrics[name].total.shape == (len(layers), 4)
  assert metrics['co_activation'].total.shape == (len(layers), 4, 4)
  for i in range(4):
    assert ('moe' in params[f'block_{i}']) == (i in layers)
    assert ('feed_forward' in params[f'block_{i}']) == (i not in layers)


def _shapes(config):
  """Of metrics, and of parameters."""
  task = experiment.build_task(experiment.resolve_auto(config), 11)
  tokens = jnp.zeros((2, 16), jnp.int32)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': jnp.ones((2, 16))}

  def run():
    params, state = task.init(jax.random.key(0), batch)
    key = jax.random.key(1)
    return task.loss(params, state, batch, key, train=True)[1].metrics, params

  return jax.eval_shape(run)


@pytest.mark.slow
def test_a_run_without_experts(tiny, tmp_path):
  """Metrics of routing are missing; all others are there."""
  changes = {'moe.first_dense_layers': 1, 'model.num_layers': 1}
  changes |= {'num_train_steps': 4, 'sample.num_tokens': 0}
  trainer = experiment.build(tiny(changes), tmp_path)
  assert trainer.fit() == 'done'
  lines = (tmp_path / 'metrics.jsonl').read_text()
  assert 'train/cross_entropy' in lines and 'val/cross_entropy' in lines
  for word in ('load', 'aux_', 'expert', 'activation', 'vio', 'alarm'):
    assert word not in lines


@pytest.fixture(
  params=[
    pytest.param({}, id='base'),
    pytest.param(MODERN, id='modern', marks=pytest.mark.slow),
  ]
)
def model(tiny, request):
  """Function `(tokens, mask) -> logits` of a model far from linear."""
  config = tiny({**request.param, 'precision': 'float32'})
  task = experiment.build_task(experiment.resolve_auto(config), vocab_size=11)
  batch = {'inputs': jnp.zeros((1, 16), jnp.int32)}
  params, _ = jax.jit(task.init)(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: 3 * x, params)

  @jax.jit
  def logits(tokens, mask):
    return task.model.apply({'params': params}, tokens, mask, train=False)[0]

  return logits


def test_no_logit_sees_the_future_or_another_sequence(model, rng):
  tokens = jnp.asarray(rng.integers(0, 11, (3, 16)))
  mask = jnp.ones((3, 16), bool)
  before = model(tokens, mask)
  for t in range(1, 16):
    after = model(tokens.at[:, t:].set((tokens[:, t:] + 1) % 11), mask)
    np.testing.assert_allclose(after[:, :t], before[:, :t], atol=1e-5)
    assert np.abs(after[:, t:] - before[:, t:]).max() > 1e-2
  after = model(tokens.at[1:].set((tokens[1:] + 1) % 11), mask)
  np.testing.assert_allclose(after[0], before[0], atol=1e-5)


def test_the_past_matters_up_to_the_first_token(model, rng):
  tokens = jnp.asarray(rng.integers(0, 11, (3, 16)))
  mask = jnp.ones((3, 16), bool)
  changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % 11)
  difference = model(changed, mask)[:, -1] - model(tokens, mask)[:, -1]
  assert np.abs(difference).max() > 1e-4


def test_padding_does_not_move_other_logits(model, rng):
  tokens = jnp.asarray(rng.integers(0, 11, (3, 16)))
  mask = jnp.ones((3, 16), bool)
  before = model(tokens, mask)
  after = model(tokens, mask.at[2].set(False))
  np.testing.assert_allclose(after[:2], before[:2], atol=1e-5)


@pytest.mark.parametrize('first_dense_layers', mostly_slow([0, 2]))
def test_blocks_whose_outputs_start_at_zero_are_the_identity(
  tiny, first_dense_layers
):
  """Without positions, logits are then a function of the token alone."""
  changes = {'model.position': 'rope', 'moe.num_shared': 1}
  changes |= {'moe.first_dense_layers': first_dense_layers}
  tokens = jnp.array([[3, 5, 3, 3, 5]])
  spread = {}
  for zero in (False, True):
    config = experiment.resolve_auto(
      tiny({**changes, 'model.zero_outputs': zero})
    )
    task = experiment.build_task(config, 11)
    trained = task.init(jax.random.key(0), {'inputs': tokens})
    logits, _ = jax.jit(task.logits)(trained, tokens)
    spread[zero] = np.ptp(logits[0, [0, 2, 3]], axis=0).max()
  assert spread[True] < 1e-6 < 0.01 < spread[False]


# How it is put together.


def test_a_block_is_its_parts(tiny, rng):
  """The output of a block is the composition of its modules' outputs."""
  changes = {**MODERN, 'moe.first_dense_layers': 0, 'moe.num_shared': 1}
  config = experiment.resolve_auto(tiny({**changes, 'precision': 'float32'}))
  task = experiment.build_task(config, 11)
  tokens = jnp.zeros((2, 16), jnp.int32)
  shapes, _ = jax.eval_shape(task.init, jax.random.key(0), {'inputs': tokens})
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32),
    shapes['block_0'],
  )
  x = jnp.asarray(rng.normal(size=(2, 16, 16)), jnp.float32)
  inputs = RouterInputs(tokens, jnp.ones((2, 16), bool))
  make = task.model.blocks[0].keywords

  def part(module, params, *args):
    return module.apply({'params': params}, *args, train=False)[0]

  def before(kind, x):
    norm, convolution = make['norm'](), make['convolution']()
    x = norm.apply({'params': params[f'{kind}_norm']}, x)
    variables = {'params': params[f'{kind}_convolution']}
    return convolution.apply(variables, x, None, jnp.zeros(2, jnp.int32))[0]

  attended = part(
    make['attention'](),
    params['attention'],
    before('attention', x),
    AttentionInputs(),
  )
  x_then = x + attended
  normed, layer = before('feed_forward', x_then), make['feed_forward']()
  of_layer = params['feed_forward']
  expected = (
    x_then
    + part(layer.routed(), of_layer['moe'], normed, inputs)
    + part(layer.shared(), of_layer['shared'], normed, inputs)
  )
  block = task.model.blocks[0](name='block_0')
  np.testing.assert_allclose(
    part(block, params, x, inputs), expected, rtol=1e-4, atol=1e-3
  )


def test_dropout_is_on_embeddings_and_on_both_branches(tiny):
  config = experiment.resolve_auto(tiny({'model.dropout_rate': 0.5}))
  task, found = experiment.build_task(config, 11), []
  tokens = jnp.zeros((2, 16), jnp.int32)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': jnp.ones((2, 16))}

  def note(call, args, kwargs, context):
    if isinstance(context.module, Dropout):
      rate, train = context.module.rate, kwargs['train']
      found.append((context.module.path[:-1], rate, train))
    return call(*args, **kwargs)

  def run():
    params, state = task.init(jax.random.key(0), batch)
    found.clear()
    key = jax.random.key(1)
    return task.loss(params, state, batch, key, train=True)[0].sum

  with nn.intercept_methods(note):
    jax.eval_shape(run)
  places = [(), *2 * [('block_0',)], *2 * [('block_1',)]]
  assert found == [(place, 0.5, True) for place in places]


@pytest.mark.parametrize('name', BALANCE)
def test_routers_have_the_balance_of_the_config(tiny, name):
  config = experiment.resolve_auto(tiny({'moe.balance': name}))
  task = experiment.build_task(config, 11)
  assert task.balance == name
  for block in task.model.blocks:
    assert block.keywords['feed_forward']().router().balance == name


@pytest.mark.parametrize('num_experts', [1, 16])
def test_each_expert_starts_as_if_it_were_alone(num_experts):
  """He et al. 2015: a variance of 2 / fan-in, of its own matrix."""
  keys = iter(jax.random.split(jax.random.key(0), 9))
  made = experts.make(
    lambda name, init, shape: init(next(keys), shape),
    64,
    num_experts=num_experts,
    d_ff=256,
    activation='swiglu',
    use_bias=True,
  )
  for w, fan_in in ((made.w_in, 64), (made.w_gate, 64), (made.w_out, 256)):
    assert float(w.std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_spikes_are_the_configs(tiny, tmp_path):
  changes = {'optimizer.spike_factor': 3.0, 'optimizer.spike_window': 5}
  trainer = experiment.build(tiny(changes), tmp_path)
  assert trainer._spikes == Spikes(3.0, 5)
