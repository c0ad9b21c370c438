"""Routing in model_state: the selection bias and the balance loss's weight."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment, optimizers
from nanomoe.callbacks import AuxWeight
from nanomoe.config import overrides as config_lib
from nanomoe.config import resume
from nanomoe.moe import RouterInputs
from nanomoe.run import workdir
from tests.routed import NUM_EXPERTS, QUICKLY, TOP_K, make
from trainers import metrics as metrics_lib
from trainers import step as step_lib
from trainers.callbacks import Callback
from trainers.state import TrainState

VOCAB = 11


def draw_batch(rng):
  tokens = rng.integers(0, VOCAB, (4, 17)).astype(np.int32)
  return {
    'inputs': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': np.ones((4, 16), np.float32),
  }


@pytest.mark.slow
def test_an_update_moves_the_bias_and_a_skipped_one_does_not(tiny, rng):
  """The losses of routing are logged, raw and weighted."""
  config = experiment.resolve_auto(
    tiny(
      {
        'moe.router.type': 'Sigmoid',
        'moe.router.bias_rate': 0.125,
        'moe.z_weight': 0.3,
        'moe.entropy_weight': -0.2,
        'precision': 'float32',
      }
    )
  )
  task = experiment.build_task(config, VOCAB)
  optimizer, schedule = optimizers.build(config.optimizer, 10)
  batch, key = draw_batch(rng), jax.random.key(0)
  start = QUICKLY(
    lambda: TrainState.create(*task.init(key, batch), optimizer)
  )()
  assert set(start.model_state) == {'aux_weight', 'bias'}
  assert not start.model_state['bias'].any()
  step = QUICKLY(step_lib.make_train_step(task, optimizer, schedule))

  state, metrics = step(start, batch, key)
  values = metrics_lib.compute(metrics)
  load = np.array(values['train/expert_load'])
  np.testing.assert_array_equal(
    state.model_state['bias'],
    0.125 * np.sign(load.mean(axis=1, keepdims=True) - load),
  )
  assert state.model_state['bias'].any(axis=1).all()  # Of every layer.
  weights = {'aux_loss': 0.01, 'z_loss': 0.3, 'router_entropy': -0.2}
  for name, weight in weights.items():
    assert values[f'train/weighted_{name}'] == pytest.approx(
      weight * np.mean(values[f'train/{name}']), rel=1e-5
    )
  total = values['train/cross_entropy'] + sum(
    values[f'train/weighted_{name}'] for name in weights
  )
  assert values['train/loss'] == pytest.approx(total, rel=1e-5)

  spoiled = {**batch, 'weights': batch['weights'] * np.float32(np.inf)}
  after, _ = step(state, spoiled, key)
  assert after.skipped == 1
  jax.tree.map(
    np.testing.assert_array_equal, after.model_state, state.model_state
  )

  raised = {**state.model_state, 'aux_weight': jnp.float32(7)}
  _, metrics = step(state.replace(model_state=raised), batch, key)
  values = metrics_lib.compute(metrics)
  assert values['train/weighted_aux_loss'] == pytest.approx(
    7 * values['train/aux_loss'], rel=1e-5
  )
  assert step._cache_size() == 1  # Nothing was compiled again.


def test_the_bias_evens_out_the_loads(tiny, rng):
  """The router sends nearly all tokens to two experts. Wang et al. 2024."""
  config = tiny({'moe.router.type': 'Sigmoid', 'moe.router.bias_rate': 0.002})
  task = experiment.build_task(experiment.resolve_auto(config), VOCAB)
  x = jnp.asarray(rng.normal(size=(4, 64, 5)) + 1, jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(5, NUM_EXPERTS)) / 2, jnp.float32)
  kernel = kernel.at[:, :2].add(0.5)
  tokens, mask = jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64), bool)

  def load(bias):
    params = {'params': {'kernel': kernel}}
    inputs = RouterInputs(tokens, mask, bias)
    return make('Sigmoid').apply(params, x, inputs, train=True).load

  @QUICKLY
  def balanced(bias):
    def update(_, bias):
      statistics = {'expert_load': load(bias)[None]}
      return task.advance({'bias': bias[None]}, statistics)['bias'][0]

    bias = jax.lax.fori_loop(0, 1000, update, bias)
    return load(jnp.zeros_like(bias)), load(bias)

  before, after = balanced(jnp.zeros(NUM_EXPERTS))
  mean = TOP_K * mask.size / NUM_EXPERTS
  assert before.max() > 2 * mean
  assert after.max() < 1.15 * mean


@pytest.mark.slow
def test_each_layers_bias_selects_its_experts(tiny, rng):
  """It does in training, evaluation and generation, between dense layers."""
  config = experiment.resolve_auto(
    tiny(
      {
        'moe.router.type': 'Sigmoid',
        'model.num_layers': 4,
        'moe.every': 2,
        'precision': 'float32',
      }
    )
  )
  task = experiment.build_task(config, VOCAB)
  batch, key = draw_batch(rng), jax.random.key(0)
  params, state = QUICKLY(task.init)(key, batch)
  params = jax.tree.map(lambda x: 3 * x, params)  # Logits differ more.
  layers, wanted = [0, 1], [3, 1]
  biased = {**state, 'bias': state['bias'].at[layers, wanted].set(10.0)}

  def load(state, train):
    aux = task.loss(params, state, batch, key, train=train)[1]
    return aux.statistics['expert_load']

  for train in (False, True):
    found = QUICKLY(load, static_argnums=1)(biased, train)
    assert (found[layers, wanted] == 64).all()  # Every token, each its own.
  one, other = (
    QUICKLY(task.logits)((params, s), batch['inputs'])[0]
    for s in (state, biased)
  )
  assert np.abs(one - other).max() > 1e-3


def _loop(aux_weight):
  """Returns the part of a trainer that AuxWeight uses."""
  state = TrainState.create(jnp.ones(()), {}, types.SimpleNamespace(init=str))
  given = {'aux_weight': jnp.float32(aux_weight), 'bias': jnp.ones(2)}
  loop = types.SimpleNamespace(state=state.replace(model_state=given))
  loop.update_state = lambda fn: vars(loop).update(state=fn(loop.state))
  return loop


@pytest.mark.parametrize(
  ('before', 'now', 'expected'),
  [
    (0.25, 0.25, 4.0),  # A callback raised it; nobody changed the config.
    (0.25, 0.5, 0.5),  # --config.moe.aux_weight=0.5
    (None, 0.5, 0.5),  # A new run, from the weights of another.
  ],
)
def test_a_changed_config_wins_over_what_was_restored(before, now, expected):
  callback = AuxWeight(now)
  if before is not None:
    callback.load_state_dict(AuxWeight(before).state_dict())
  loop = _loop(4.0)
  callback.on_fit_start(loop)
  after = loop.state.model_state
  assert after['aux_weight'] == expected
  assert after['aux_weight'].aval == jnp.float32(1).aval
  assert after['bias'].all()


def test_a_changed_config_wins_over_what_a_rollback_restored():
  callback = AuxWeight(0.5)
  callback.load_state_dict(AuxWeight(0.25).state_dict())
  loop = _loop(0.25)
  callback.on_roll_back(loop)
  assert loop.state.model_state['aux_weight'] == 0.5


class Raise(Callback):
  """Callback that raises the weight of the balance loss at step 3."""

  def on_train_step_end(self, loop):
    if loop.step == 3:
      own = {'aux_weight': jnp.float32(2)}
      loop.update_state(
        lambda state: state.replace(model_state={**state.model_state, **own})
      )


@pytest.mark.slow
def test_a_raised_weight_and_the_bias_survive_a_resume(tiny, tmp_path):
  """The resume is bitwise; a weight then given by name replaces it."""
  changes = {
    'moe.router.type': 'Sigmoid',
    'callbacks.raise.type': 'tests.test_routing_state.Raise',
    'num_train_steps': 8,
  }

  def run(name, **more):
    directory = tmp_path / name
    trainer = experiment.build(tiny(changes | more), directory)
    assert trainer.fit() == 'done'
    return trainer.state

  whole = run('whole')
  assert whole.model_state['aux_weight'] == 2
  assert whole.model_state['bias'].any()
  run('parts', num_train_steps=5)
  jax.tree.map(np.testing.assert_array_equal, run('parts'), whole)

  more = {'num_train_steps': '9', 'moe.aux_weight': '0.5'}
  old = workdir.config_of(tmp_path / 'parts')
  new = config_lib.apply(old, list(more.items()))
  trainer = experiment.build(
    resume.resume_config(old, new, more), tmp_path / 'parts'
  )
  assert trainer.fit() == 'done'
  assert trainer.state.model_state['aux_weight'] == 0.5
  # It stands when the run goes on again.
  assert run('parts', **{**more, 'num_train_steps': 10}).model_state[
    'aux_weight'
  ] == pytest.approx(0.5)
