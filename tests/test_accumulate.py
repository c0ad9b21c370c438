"""Accumulated gradients equal those of the large batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from nanomoe import experiment, optimizers
from nanomoe.config import overrides, validation
from nanomoe.moe import RouterInputs
from nanomoe.moe.losses import BALANCE
from nanomoe.task import LanguageModel
from tests import regression
from tests.routed import QUICKLY, VARIANTS
from tests.routed import layer as make_layer
from tests.routed import make as make_router
from tests.shrunk import TINY, mostly_slow
from trainers import metrics as metrics_lib
from trainers import step as step_lib
from trainers.accumulate import make_gradient
from trainers.errors import UserError
from trainers.state import TrainState
from trainers.task import Part

VOCAB, BATCH, TIME = 11, 8, 8
ALL = {
  'moe.aux_weight': 0.5,
  'moe.z_weight': 0.1,
  'moe.entropy_weight': -0.2,
  'confidence_weight': 0.1,
}
SWITCH = {'moe.balance': 'switch_sum', 'moe.aux_weight': 0.01}
SIGMOID = {'moe.router.type': 'Sigmoid', 'moe.router.bias_rate': 0.125}
# What compiles quickly.
DENSE, ONE = {'moe.dispatch': 'dense'}, {'model.num_layers': 1}
# Rows 3 and 7 are padding alone: one micro-batch of 4, two micro-batches of 8.
LENGTHS = {'full': [8] * 8, 'uneven': [8, 5, 8, 0, 1, 8, 2, 0]}


def _config(changes):
  values = {**TINY, 'precision': 'float32', 'batch_size': BATCH}
  values |= {'block_size': TIME, **changes}
  return experiment.resolve_auto(
    overrides.apply(base.get_config(), [(k, str(v)) for k, v in values.items()])
  )


def _task(changes) -> LanguageModel:
  return experiment.build_task(_config(changes), VOCAB)


def _batch(lengths='uneven', seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, VOCAB, (BATCH, TIME + 1)).astype(np.int32)
  weights = np.arange(TIME) < np.array(LENGTHS[lengths])[:, None]
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    # Some tokens count for a half.
    'weights': weights * rng.choice(np.float32([0.5, 1]), weights.shape),
  }


def _trained(task):
  """Returns parameters with a skewed router, and a state with biases."""
  params, state = QUICKLY(task.init)(jax.random.key(0), _batch())
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x * (6 if 'router' in jax.tree_util.keystr(path) else 1),
    params,
  )
  if 'bias' in state:
    state['bias'] = jnp.linspace(-0.1, 0.1, state['bias'].size).reshape(
      state['bias'].shape
    )
  return params, state


def _gradient(task, num_parts, batch, trained=None):
  trained = trained or _trained(task)
  fn = QUICKLY(make_gradient(task, num_parts))
  return jax.device_get(fn(*trained, batch, jax.random.key(1)))


@functools.cache
def _reference(changes, lengths):
  return _gradient(_task(dict(changes)), 1, _batch(lengths))


@functools.cache
def _reference_of_doubles(changes, lengths):
  return _gradient_of_doubles(_task(dict(changes)), 1, _batch(lengths))


def _gradient_of_doubles(task, num_parts, batch):
  """Returns the gradient in float64, but for products, which stay float32."""
  trained = _trained(task)
  with jax.enable_x64(True):
    trained, batch = jax.tree.map(
      lambda x: np.float64(x) if x.dtype == np.float32 else np.asarray(x),
      (trained, batch),
    )
    return _gradient(task, num_parts, batch, trained)


def _error(found, expected):
  """Returns the largest error of a leaf, relative to its largest element."""
  return max(
    jax.tree.leaves(
      jax.tree.map(
        lambda a, b: np.abs(a - b).max() / (np.abs(b).max() or 1),
        found,
        expected,
      )
    )
  )


def _assert_equal(found, expected, tolerance=2e-5):
  np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
  assert _error(found.grads, expected.grads) < tolerance
  assert set(found.aux.metrics) == set(expected.aux.metrics)
  for name, metric in found.aux.metrics.items():
    other = expected.aux.metrics[name]
    assert type(metric) is type(other), name
    for a, b in zip(metric, other, strict=True):
      assert (a.shape, a.dtype) == (b.shape, b.dtype), name
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
      metric.compute(), other.compute(), rtol=2e-5, atol=1e-6, err_msg=name
    )
  if expected.aux.statistics:
    np.testing.assert_array_equal(
      found.aux.statistics['expert_load'],
      expected.aux.statistics['expert_load'],
    )


def _check(changes, num_parts, lengths='uneven', **others):
  """Compares micro-batches with the batch; `others` change no result."""
  expected = _reference(tuple(changes.items()), lengths)
  assert np.isfinite(expected.loss)
  task = _task(changes | {k.replace('_', '.', 1): v for k, v in others.items()})
  _assert_equal(_gradient(task, num_parts, _batch(lengths)), expected)


@pytest.mark.parametrize(
  ('changes', 'num_parts', 'others'),
  [
    pytest.param(SWITCH | ONE, 4, {}, marks=pytest.mark.slow),
    pytest.param(
      {'moe.balance': 'all_choices', **ALL, **SIGMOID, **DENSE},
      2,
      {},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {'moe.balance': 'per_sequence', **ALL, **ONE},
      8,
      {'model_remat': True},
      marks=pytest.mark.slow,
    ),
  ],
  ids=['switch_sum', 'all_choices', 'per_sequence'],
)
def test_micro_batches_equal_the_batch(changes, num_parts, others):
  """Also dropout, which would make errors of 100 %."""
  _check(changes, num_parts, **others)


def _check_doubles(changes, num_parts, lengths='uneven', **others):
  """Compares as `_check`, where no gradient is near its rounding in float32.

  Some gradients of the large batch in float32 are 1e-4 from those in float64.
  """
  expected = _reference_of_doubles(tuple(changes.items()), lengths)
  assert np.isfinite(expected.loss)
  task = _task(changes | {k.replace('_', '.', 1): v for k, v in others.items()})
  found = _gradient_of_doubles(task, num_parts, _batch(lengths))
  _assert_equal(found, expected, tolerance=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('router', 'z_weight', 'entropy_weight', 'lengths', 'num_parts', 'depth'),
  [({}, 0.0, 0.0, 'full', 8, ONE), (SIGMOID, 0.1, -0.2, 'uneven', 4, {})],
  ids=['TopK', 'Sigmoid'],
)
@pytest.mark.parametrize('balance', BALANCE)
def test_every_loss_equals_that_of_the_batch(
  balance, entropy_weight, z_weight, router, lengths, num_parts, depth
):
  changes = {
    'moe.balance': balance,
    'moe.z_weight': z_weight,
    **router,
    **depth,
  }
  changes['moe.entropy_weight'] = entropy_weight
  _check_doubles(changes, num_parts, lengths)


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'moe.first_dense_layers': 2},
    {'moe.dispatch': 'dense', 'moe.num_shared': 1, 'moe.router.type': 'Hash'},
    {'moe.dispatch': 'grouped', 'moe.aux_weight': 0.0},
    {
      'moe.dispatch': 'dropless',
      'moe.eval_dispatch': 'capacity',
      'moe.router.type': 'Softmax',
      'moe.router.renormalize': True,
    },
    {
      'model.norm': 'RMSNorm',
      'model.position': 'rope',
      'model.conv_width': 3,
      'model.num_kv_heads': 1,
      'model.max_ngram': 2,
      'model.dropout_rate': 0.5,
    },
  ],
  ids=str,
)
def test_every_part_of_a_model_accumulates(changes):
  # Grouped products have no gradient in float64.
  is_grouped = changes.get('moe.dispatch') == 'grouped'
  check = _check if is_grouped else _check_doubles
  check(changes, 4, model_remat='block')


@pytest.mark.slow
def test_micro_batches_with_loads_of_their_own_differ(monkeypatch):
  """The tolerances would notice: the error is 1000 times as large."""
  expected = _reference(tuple(SWITCH.items()), 'uneven')
  survey = LanguageModel.survey

  def without_loads(*args):
    return survey(*args)._replace(load=None)

  monkeypatch.setattr(LanguageModel, 'survey', without_loads)
  found = _gradient(_task(SWITCH), 4, _batch())
  routers = [
    g.grads['block_0']['moe']['router']['kernel'] for g in (found, expected)
  ]
  assert _error(*routers) > 0.02
  assert abs(found.loss / expected.loss - 1) > 1e-5  # Ten tolerances.


@pytest.mark.parametrize(
  ('changes', 'num_forwards'),
  [({}, 2), ({'moe.balance': 'per_sequence'}, 1)],
)
def test_loads_take_a_forward_pass_if_the_loss_needs_them(
  changes, num_forwards, monkeypatch
):
  task, batch, key = _task(changes), _batch(), jax.random.key(1)
  shapes = jax.eval_shape(task.init, key, batch)
  calls = []
  apply = LanguageModel._apply

  def counted(*args):
    calls.append(args)
    return apply(*args)

  monkeypatch.setattr(LanguageModel, '_apply', counted)
  jax.eval_shape(make_gradient(task, 4), *shapes, batch, key)
  assert len(calls) == num_forwards


@pytest.mark.slow
def test_the_forward_pass_is_skipped_while_the_weight_is_0():
  """A callback may raise the weight of a compiled step."""
  task, batch, key = _task({}), _batch(), jax.random.key(1)
  params, state = _trained(task)
  part = Part(jnp.int32(0), 1)
  survey = QUICKLY(lambda s: task.survey(params, s, batch, key, part))
  known = survey(state)
  num_tokens = sum(LENGTHS['uneven'])
  assert known.load.sum(axis=1).tolist() == [num_tokens, num_tokens]
  assert (known.tokens, known.sequences) == (num_tokens, 6)
  assert known.weight == pytest.approx(batch['weights'].sum())
  assert not survey({**state, 'aux_weight': jnp.float32(0)}).load.any()


@pytest.mark.slow
def test_one_micro_batch_is_the_program_without_accumulation():
  task, batch, key = _task({}), _batch(), jax.random.key(1)
  shapes = jax.eval_shape(task.init, key, batch)

  def gradient(params, model_state, batch, key):
    def loss_fn(params):
      total, aux = task.loss(params, model_state, batch, key, train=True)
      return total.sum / total.weight, (total, aux)

    (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, rest, grads

  found, expected = (
    str(jax.make_jaxpr(fn)(*shapes, batch, key))
    for fn in (make_gradient(task, 1), gradient)
  )
  assert found == expected


@pytest.mark.slow
def test_ten_steps_equal_those_of_the_batch():
  """Parameters of AdamW, biases of routers and metrics."""
  # Biases of keys have no gradient: AdamW would turn rounding into updates.
  changes = {**ALL, **SIGMOID, **DENSE, **ONE, 'model.bias': False}
  config = _config(changes)
  task = experiment.build_task(config, VOCAB)
  optimizer, schedule = optimizers.build(config.optimizer, 10)
  batches = [_batch(seed=i) for i in range(10)]

  def train(accumulate_steps):
    step = QUICKLY(
      step_lib.make_train_step(
        task, optimizer, schedule, accumulate_steps=accumulate_steps
      )
    )
    state = QUICKLY(TrainState.create, static_argnums=2)(
      *_trained(task), optimizer
    )
    running = None
    for batch in batches:
      state, metrics = step(state, batch, jax.random.key(3))
      running = metrics_lib.merge(running, metrics) if running else metrics
    return jax.device_get((state, running))

  (found, metrics), (expected, expected_metrics) = train(4), train(1)
  assert found.skipped == 0
  assert _error(found.params, expected.params) < 2e-5
  np.testing.assert_array_equal(
    found.model_state['bias'], expected.model_state['bias']
  )
  shapes = [
    jax.tree.map(lambda x: (x.shape, x.dtype), m)
    for m in (metrics, expected_metrics)
  ]
  assert shapes[0] == shapes[1]  # A checkpoint of one resumes with the other.
  found, expected = map(metrics_lib.compute, (metrics, expected_metrics))
  for name, value in expected.items():
    np.testing.assert_allclose(
      found[name], value, rtol=1e-4, atol=1e-6, err_msg=name
    )


@pytest.mark.slow
def test_memory_falls_with_the_number_of_micro_batches():
  changes = {'block_size': 64, 'model.d_model': 32, 'model.num_layers': 1}
  task = _task({**changes, 'moe.first_dense_layers': 1})
  tokens = jax.ShapeDtypeStruct((BATCH, 64), jnp.int32)
  weights = jax.ShapeDtypeStruct((BATCH, 64), jnp.float32)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': weights}
  key = jax.random.key(0)
  shapes = jax.eval_shape(task.init, key, batch)
  one, four = (
    QUICKLY(make_gradient(task, num_parts))
    .lower(*shapes, batch, key)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for num_parts in (1, 4)
  )
  assert four < 0.4 * one


# What is refused.


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'moe.router.type': 'ExpertChoice'}, 'ExpertChoice'),
    ({'moe.router.type': 'NoisyTopK'}, 'NoisyTopK'),
    ({'moe.router.type': 'Softmax', 'moe.router.jitter': 0.1}, "'jitter': 0.1"),
    ({'moe.dispatch': 'capacity'}, "moe.dispatch='capacity'"),
  ],
)
def test_what_cannot_be_equal_is_one_line(changes, named):
  with pytest.raises(UserError) as error:
    _task({**changes, 'accumulate_steps': 2})
  (line,) = error.value.problems
  assert line.startswith('accumulate_steps=2: ') and named in line
  assert 'accumulate_steps must be 1' in line
  _task(changes)
  _task({**changes, 'accumulate_steps': 2, 'moe.first_dense_layers': 2})


@pytest.mark.parametrize(
  'changes',
  [
    {'moe.router.type': 'Softmax'},
    {'moe.router.type': 'Hash'},
    {'moe.dispatch': 'dropless', 'moe.eval_dispatch': 'capacity'},
  ],
  ids=str,
)
def test_what_is_equal_is_built(changes):
  _task({**changes, 'accumulate_steps': 2})


@pytest.mark.parametrize(
  ('steps', 'num_lines'), [(1, 0), (4, 0), (3, 1), (0, 1)]
)
def test_micro_batches_divide_the_batch(steps, num_lines):
  config = _config({'batch_size': 8}).to_dict()
  lines = validation.problems({**config, 'accumulate_steps': steps})
  assert len(lines) == num_lines
  assert all(f'accumulate_steps={steps}' in line for line in lines)


class _Sums(regression.Regression):
  """A regression whose sums need nothing of the batch."""

  def loss(self, *args, train, part=None):
    assert part is None or part.known is None
    return super().loss(*args, train=train)


@pytest.mark.parametrize(
  'variant', mostly_slow(VARIANTS, 'TopK', 'ExpertChoice')
)
def test_separable_says_what_routers_do(variant, rng):
  """In training, rows of a batch are routed as in the batch, or are not."""
  layer, router = make_layer(variant, 'dense'), make_router(variant)
  x = jnp.asarray(rng.normal(size=(4, 6, 5)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, VOCAB, (4, 6)))
  rngs = {'params': jax.random.key(0), 'routing': jax.random.key(1)}

  @QUICKLY
  def errors(x, tokens):
    inputs = RouterInputs(tokens, jnp.ones(tokens.shape, bool))
    (y, _), params = layer.init_with_output(rngs, x, inputs, train=True)
    inputs = RouterInputs(tokens[1::2], jnp.ones((2, 6), bool))
    part, _ = layer.apply(params, x[1::2], inputs, train=True, rngs=rngs)
    return jnp.abs(part - y[1::2]).max()

  assert (errors(x, tokens) < 1e-5) == router.separable


def test_a_task_of_sums_needs_the_keyword_alone():
  batch = regression.Rows().batch(0)
  task = _Sums()
  trained = task.init(jax.random.key(0), batch)
  found, expected = (_gradient(task, n, batch, trained) for n in (4, 1))
  np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-6)
  assert _error(found.grads, expected.grads) < 2e-6
  assert found.aux.statistics == expected.aux.statistics
  with pytest.raises(ValueError, match=r'accumulate_steps=3: .* batch of 8'):
    _gradient(task, 3, batch, trained)


def test_a_trainer_accumulates():
  trainers = [
    regression.make_trainer(task=_Sums(), accumulate_steps=n) for n in (1, 2)
  ]
  assert [trainer.fit() for trainer in trainers] == ['done', 'done']
  one, two = (trainer.state.params for trainer in trainers)
  assert _error(regression.host(two), regression.host(one)) < 2e-6


def test_a_task_without_the_keyword_is_refused():
  with pytest.raises(ValueError, match=r'accumulate_steps=2: Regression\.loss'):
    regression.make_trainer(accumulate_steps=2)
  with pytest.raises(ValueError, match='accumulate_steps=0'):
    make_gradient(regression.Regression(), 0)
