"""The loss: its terms, its metrics, padding and work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.products import ideal
from configs import base
from nanomoe import experiment, optimizers
from nanomoe.ops.cross_entropy import cross_entropy
from nanomoe.ops.matmul import PRECISIONS
from nanomoe.planning import products
from tests.routed import QUICKLY
from tests.shrunk import mostly_slow
from trainers import metrics as metrics_lib
from trainers import step as step_lib
from trainers.state import TrainState

VOCAB = 11


@pytest.fixture
def task_and_trained(tiny):
  config = experiment.resolve_auto(tiny({'precision': 'float32'}))
  task = experiment.build_task(config, VOCAB)
  batch = {'inputs': jnp.zeros((1, 16), jnp.int32)}
  params, state = QUICKLY(task.init)(jax.random.key(0), batch)
  return task, (jax.tree.map(lambda x: 3 * x, params), state)


def _batch(rng, rows=4):
  tokens = rng.integers(0, VOCAB, (rows, 17)).astype(np.int32)
  return {
    'inputs': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'weights': jnp.ones((rows, 16)),
  }


def _evaluate(task, trained, batch):
  total, aux = jax.jit(
    lambda p, b: task.loss(*p, b, jax.random.key(0), train=False)
  )(trained, batch)
  return float(total.sum / total.weight), metrics_lib.compute(aux.metrics)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
  'precision', ['bfloat16', pytest.param('float32', marks=pytest.mark.slow)]
)
def test_gradients_are_the_same_compiled_or_not(tiny, rng, precision):
  """Gradients are also stored in the order that the next program assumes."""
  changes = {'model.num_layers': 1, 'moe.first_dense_layers': 1}
  changes |= {'model.bias': 'false', 'model.tie_embeddings': 'true'}
  config = experiment.resolve_auto(tiny({**changes, 'precision': precision}))
  task = experiment.build_task(config, VOCAB)
  batch = _batch(rng, rows=2)
  params, _ = task.init(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: 3 * x, params)

  def loss(params):
    total, _ = task.loss(params, {}, batch, jax.random.key(1), train=False)
    return total.sum / total.weight

  compiled, expected = jax.jit(jax.grad(loss))(params), jax.grad(loss)(params)
  for one, other in zip(
    jax.tree.leaves(compiled), jax.tree.leaves(expected), strict=True
  ):
    # NumPy would hide a wrong order, so the device compares.
    error = jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(other))
    assert error < 0.002  # Largest error of one rounding to bfloat16.


def test_cross_entropy_is_the_definition(rng):
  logits = rng.normal(size=(2, 3, VOCAB)).astype(np.float32) * 5
  targets = rng.integers(0, VOCAB, (2, 3)).astype(np.int32)
  probs = np.exp(np.float64(logits))
  probs /= probs.sum(-1, keepdims=True)
  expected = -np.log(np.take_along_axis(probs, targets[..., None], -1))[..., 0]
  actual = cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
  np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_parts_of_the_loss(task_and_trained, rng):
  """The total is cross-entropy + aux_weight * aux_loss."""
  task, trained = task_and_trained
  batch = _batch(rng)
  total, metrics = _evaluate(task, trained, batch)
  logits = np.float64(QUICKLY(task.logits)(trained, batch['inputs'])[0])
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nats = -np.take_along_axis(log_probs, batch['targets'][..., None], -1).mean()
  assert metrics['cross_entropy'] == pytest.approx(nats, rel=1e-4)
  assert metrics['bits_per_char'] == pytest.approx(nats / np.log(2), rel=1e-4)
  assert metrics['aux_loss'] > 1  # Two layers: 2 if uniform.
  assert total == pytest.approx(nats + 0.01 * metrics['aux_loss'], rel=1e-4)
  load = np.array(metrics['expert_load'])
  np.testing.assert_allclose(load.sum(axis=1), 1, 1e-5)
  np.testing.assert_allclose(
    metrics['max_over_mean_load'], load.max(axis=1) * load.shape[1], 1e-5
  )
  assert np.shape(metrics['router_entropy']) == (2,)


@pytest.mark.parametrize('experts', mostly_slow([True, False]))
def test_confidence_is_penalized_in_training_alone(tiny, rng, experts):
  """Training subtracts weight * entropy from the loss."""
  changes = {'precision': 'float32', 'model.dropout_rate': 0.0}
  changes |= {'model.num_layers': 1}
  changes |= {} if experts else {'moe.first_dense_layers': 1}
  batch = _batch(rng)
  batch['weights'] = batch['weights'].at[1, 3:].set(0.0)
  plain, penalized = (
    experiment.build_task(
      experiment.resolve_auto(tiny({**changes, 'confidence_weight': weight})),
      VOCAB,
    )
    for weight in (0.0, 0.3)
  )
  params, state = QUICKLY(plain.init)(jax.random.key(0), batch)
  trained = jax.tree.map(lambda x: 3 * x, params), state

  def totals(train):
    key = jax.random.key(0)
    for task in (plain, penalized):
      loss = QUICKLY(functools.partial(task.loss, train=train))
      total, aux = loss(*trained, batch, key)
      yield float(total.sum / total.weight), metrics_lib.compute(aux.metrics)

  logits = np.float64(QUICKLY(plain.logits)(trained, batch['inputs'])[0])
  probs = np.exp(logits)
  probs /= probs.sum(-1, keepdims=True)
  each = -(probs * np.log(probs)).sum(-1)
  entropy = each[np.asarray(batch['weights']) > 0].mean()
  assert 0.1 < entropy < 0.99 * np.log(VOCAB)
  (without, _), (with_it, metrics) = totals(train=True)
  assert without - with_it == pytest.approx(0.3 * entropy, rel=1e-4)
  assert metrics['prediction_entropy'] == pytest.approx(entropy, rel=1e-4)
  (without, metrics), (with_it, _) = totals(train=False)
  assert without == with_it
  assert metrics['prediction_entropy'] == pytest.approx(entropy, rel=1e-4)


def test_bits_are_per_character_and_byte_of_the_text(task_and_trained, rng):
  """'é' is two tokens and one character; padding has neither."""
  task, trained = task_and_trained
  spelled = [b'ab', b'\xc3', b'\xa9', 'né'.encode(), *[b'x'] * (VOCAB - 4)]
  task = type(task)(task.model, task.aux_weight, task.balance, spelled)
  batch = _batch(rng)
  batch['weights'] = batch['weights'].at[:, :7].set(0.0)
  metrics = _evaluate(task, trained, batch)[1]
  counted = np.asarray(batch['targets'])[:, 7:].ravel()
  utf8 = b''.join(spelled[t] for t in counted)
  bits = metrics['cross_entropy'] / np.log(2) * len(counted)
  np.testing.assert_allclose(
    metrics['bits_per_byte'] * len(utf8), bits, rtol=1e-5
  )
  num_chars = sum({0: 2, 1: 1, 2: 0, 3: 2}.get(int(t), 1) for t in counted)
  np.testing.assert_allclose(
    metrics['bits_per_char'] * num_chars, bits, rtol=1e-5
  )


def test_padding_counts_in_nothing(task_and_trained, rng):
  """Metrics of 4 rows, of which one is padding, are those of the 3 others."""
  task, trained = task_and_trained
  batch = _batch(rng)
  padded = {**batch, 'weights': batch['weights'].at[3].set(0.0)}
  fewer = {name: x[:3] for name, x in batch.items()}
  total, metrics = _evaluate(task, trained, padded)
  expected_total, expected = _evaluate(task, trained, fewer)
  assert total == pytest.approx(expected_total, rel=1e-5)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize('precision', PRECISIONS)
def test_products_of_a_documented_step_are_near_the_sparse_ideal(precision):
  """A step is 35.7 GFLOP at balanced loads, and 61.5 with all experts.

  Attention by blocks spares some masked scores. In bfloat16 the gradient
  computes the hidden layers again.
  """
  config = base.get_config()
  config.precision = precision
  config = experiment.resolve_auto(config)
  task = experiment.build_task(config, 65)
  shape = (config.batch_size, config.block_size)
  batch = {
    'inputs': jnp.zeros(shape, jnp.int32),
    'targets': jnp.zeros(shape, jnp.int32),
    'weights': jnp.ones(shape),
  }
  step, state = _abstract_step(config, task, batch)
  counted = products.count(step, state, batch, jax.random.key(0), trips=0)
  sizes = dict(
    num_tokens=shape[0] * shape[1],
    block_size=shape[1],
    vocab_size=65,
    d_model=config.model.d_model,
    num_layers=config.model.num_layers,
    num_experts=config.moe.num_experts,
    d_ff=config.moe.d_ff,
  )
  sparse = ideal(**sizes, experts_per_token=config.moe.top_k)
  every = ideal(**sizes, experts_per_token=config.moe.num_experts)
  assert round(sparse / 1e9, 1) == 35.7
  assert round(every / 1e9, 1) == 61.5
  hidden = 2 * sizes['num_tokens'] * config.moe.top_k * sizes['num_layers']
  hidden *= sizes['d_model'] * sizes['d_ff']
  again = hidden if precision == 'bfloat16' else 0
  assert 0.95 * sparse < counted - again < 1.02 * sparse


def _abstract_step(config, task, batch):
  optimizer, schedule = optimizers.build(config.optimizer, 100)
  state = jax.eval_shape(
    lambda key: TrainState.create(*task.init(key, batch), optimizer),
    jax.random.key(0),
  )
  return step_lib.make_train_step(task, optimizer, schedule), state
