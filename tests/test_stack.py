"""Scanned layers: the unrolled model, compiled once for all depths."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment, optimizers
from nanomoe.config import schema
from nanomoe.model import parameters
from nanomoe.model.stack import stack, unstack
from nanomoe.sampling import Generator, Sampling
from tests.routed import QUICKLY
from tests.shrunk import MODERN
from trainers import step as step_lib
from trainers.errors import UserError
from trainers.state import TrainState

pytestmark = pytest.mark.optimized

VOCAB, TIME = 11, 16

CHOICES = {
  'base': {'model.num_layers': 3},
  # A dense layer, then periods of experts and a dense layer.
  'modern': {
    **MODERN,
    'moe.every': 2,
    'model.num_layers': 5,
    'moe.dispatch': 'dense',
  },
  'bias': {
    'moe.router.type': 'Sigmoid',
    'moe.first_dense_layers': 2,
    'moe.every': 2,
    'model.num_layers': 6,
    'moe.num_shared': 1,
    'moe.dispatch': 'capacity',
  },
  'dense': {'moe.first_dense_layers': 9, 'model.num_layers': 2},
}
SHAPE = {'base': (0, 1), 'modern': (1, 2), 'bias': (2, 2), 'dense': (0, 1)}


def _task(make, changes, scan):
  changes = {'model.dropout_rate': 0.0, 'precision': 'float32', **changes}
  config = make({**changes, 'model.scan_layers': scan})
  return experiment.build_task(experiment.resolve_auto(config), VOCAB)


def _batch(rows=2):
  tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, TIME + 1))
  return {
    'inputs': jnp.asarray(tokens[:, :-1], jnp.int32),
    'targets': jnp.asarray(tokens[:, 1:], jnp.int32),
    'weights': jnp.ones((rows, TIME)),
  }


def _trained(task):
  params, state = QUICKLY(task.init)(jax.random.key(0), _batch())
  if 'bias' in state:
    # A bias of its own for every layer and expert.
    noise = jax.random.normal(jax.random.key(3), state['bias'].shape)
    state = {**state, 'bias': noise}
  return jax.tree.map(lambda x: 2 * x, params), state


def _gradient(task, params, state):
  def loss(params):
    key = jax.random.key(1)
    total, aux = task.loss(params, state, _batch(), key, train=True)
    return total.sum / total.weight, (aux.metrics, aux.statistics)

  return QUICKLY(jax.value_and_grad(loss, has_aux=True))(params)


def _assert_close(one, other, rtol, atol):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    one,
    other,
  )


@pytest.mark.slow
@pytest.mark.parametrize('choice', CHOICES)
def test_a_scan_is_the_unrolled_model(tiny, choice):
  unrolled, scanned = (
    _task(tiny, CHOICES[choice], scan) for scan in (False, True)
  )
  params, state = _trained(unrolled)
  stacked = stack(params, *SHAPE[choice])
  shapes, _ = jax.eval_shape(scanned.init, jax.random.key(0), _batch())
  assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)
  _assert_close(unstack(stacked), params, 0, 0)

  tokens = _batch()['inputs']
  logits, other = (
    QUICKLY(lambda p, task=task: task.logits((p, state), tokens)[0])(p)
    for task, p in ((unrolled, params), (scanned, stacked))
  )
  np.testing.assert_allclose(logits, other, rtol=1e-6, atol=2e-6)
  (loss, aux), gradient = _gradient(unrolled, params, state)
  (other_loss, other_aux), of_stacked = _gradient(scanned, stacked, state)
  np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
  # Reports of the layers are in the same order.
  _assert_close(aux, other_aux, 1e-5, 1e-6)
  _assert_close(gradient, unstack(of_stacked), 2e-5, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize('choice', ['modern', 'bias'])
def test_a_scan_generates_with_its_decode_cache(tiny, choice):
  changes = {**CHOICES[choice], 'moe.dispatch': 'dense'}
  unrolled, scanned = (_task(tiny, changes, scan) for scan in (False, True))
  params, state = _trained(unrolled)
  stacked = stack(params, *SHAPE[choice])
  prompts, texts = [[3], [1, 2, 3, 4, 5]], []
  for task, p, cached in (
    (unrolled, params, True),
    (scanned, stacked, True),
    (scanned, stacked, False),
  ):
    generate = Generator(task.logits, (p, state), TIME, cached=cached)
    tokens = generate(prompts, TIME + 4, Sampling(temperature=0.5), seed=0)
    texts.append(np.stack(list(tokens)).tolist())
  assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_layers_start_with_numbers_of_their_own(tiny):
  """Variances are those of one layer, whose fan-in has no axis of layers."""
  changes = {'model.num_layers': 3, 'model.d_model': 64, 'moe.d_ff': 64}
  params = {}
  for scan in (False, True):
    task = _task(tiny, changes, scan)
    tree, _ = QUICKLY(task.init)(jax.random.key(0), _batch())
    params[scan] = unstack(tree) if scan else tree
  for i in range(3):
    block, expected = (params[scan][f'block_{i}'] for scan in (True, False))
    for one, other in zip(
      jax.tree.leaves(block), jax.tree.leaves(expected), strict=True
    ):
      assert float(one.std()) == pytest.approx(float(other.std()), rel=0.2)
  w_in = [params[True][f'block_{i}']['moe']['w_in'] for i in range(3)]
  for one, other in ((0, 1), (0, 2), (1, 2)):
    correlation = np.corrcoef(w_in[one].ravel(), w_in[other].ravel())[0, 1]
    assert abs(correlation) < 0.05


@pytest.mark.parametrize('choice', ['modern', 'bias'])
def test_counts_decay_and_hidden_matrices_are_those_of_the_layers(tiny, choice):
  unrolled = _task(tiny, CHOICES[choice], False)
  params, _ = jax.eval_shape(unrolled.init, jax.random.key(0), _batch())
  stacked = jax.eval_shape(lambda p: stack(p, *SHAPE[choice]), params)
  assert parameters.count(params, 2) == parameters.count(stacked, 2)
  for kind in (parameters.matrices, parameters.hidden_matrices):
    moved = jax.tree.map(np.asarray, kind(stacked))
    # Each has two periods.
    repeated = jax.tree.map(lambda x: np.repeat(x, 2), moved['blocks'])
    assert unstack({**moved, 'blocks': repeated}) == kind(params)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['AdamW', 'Muon'])
def test_an_update_of_a_stack_is_that_of_its_layers(tiny, rng, name):
  unrolled = _task(tiny, CHOICES['modern'], False)
  shapes, _ = jax.eval_shape(unrolled.init, jax.random.key(0), _batch())
  params, gradient = (
    jax.tree.map(
      lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes
    )
    for _ in range(2)
  )
  section = tiny({'optimizer.type': name, 'optimizer.decay_mask': 'matrices'})
  optimizer, _ = optimizers.build(section.optimizer, 10)

  def update(params, gradient):
    return optimizer.update(gradient, optimizer.init(params), params)[0]

  layout = SHAPE['modern']
  one = QUICKLY(update)(params, gradient)
  other = QUICKLY(update)(stack(params, *layout), stack(gradient, *layout))
  _assert_close(one, unstack(other), 1e-3, 1e-7)


def _program(make, num_layers, changes):
  """Returns the lowered train step of a model of some depth."""
  changes = {'model.num_layers': num_layers, **changes}
  config = experiment.resolve_auto(make({**changes, 'model.scan_layers': True}))
  task = experiment.build_task(config, VOCAB)
  optimizer, schedule = optimizers.build(config.optimizer, 100)
  state = jax.eval_shape(
    lambda key: TrainState.create(*task.init(key, _batch()), optimizer),
    jax.random.key(0),
  )
  step = step_lib.make_train_step(task, optimizer, schedule)
  return jax.jit(step).lower(state, _batch(), jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({'model.remat': True}, marks=pytest.mark.slow),
    {'moe.router.type': 'Sigmoid'},
  ],
)
def test_the_program_does_not_grow_with_the_depth(tiny, changes):
  few, many = (
    len(_program(tiny, n, changes).as_text().splitlines()) for n in (2, 24)
  )
  assert few == many


@pytest.mark.slow
def test_the_time_of_compilation_does_not_grow_with_the_depth(tiny):
  seconds = {}
  for num_layers in (4, 24):
    # No other test has this width: the program is in no cache.
    program = _program(tiny, num_layers, {'moe.d_ff': 40})
    start = time.perf_counter()
    program.compile()
    seconds[num_layers] = time.perf_counter() - start
  # Six times as many layers; other processes may run.
  assert seconds[24] < 3 * seconds[4]


@pytest.mark.slow
def test_remat_and_dropout_in_a_scan(tiny):
  """Recomputed layers drop the same elements, and each layer others."""
  changes = {**CHOICES['modern'], 'model.dropout_rate': 0.5}
  without, with_it = (
    _task(tiny, {**changes, 'model.remat': remat}, True)
    for remat in (False, True)
  )
  trained = _trained(without)
  (loss, _), gradient = _gradient(without, *trained)
  (other_loss, _), other = _gradient(with_it, *trained)
  np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
  _assert_close(gradient, other, 2e-5, 2e-6)


@pytest.mark.parametrize(
  'num_layers, first, every, fits',
  [(4, 0, 2, True), (4, 1, 2, False), (5, 1, 2, True), (1, 0, 3, True)],
)
def test_a_depth_that_does_not_fit_is_one_line(
  tiny, num_layers, first, every, fits
):
  changes = {'model.num_layers': num_layers, 'moe.first_dense_layers': first}
  changes |= {'moe.every': every, 'model.scan_layers': True}
  if fits:
    tiny(changes)
    return
  with pytest.raises(UserError) as error:
    tiny(changes)
  (line,) = error.value.problems
  for word in (f'model.{num_layers=}', f'moe.{every=}', '3 or 5'):
    assert word in line


def test_a_run_keeps_its_layout():
  field = schema.FIELDS['model.scan_layers']
  assert field.resume is schema.Resume.FIXED
  assert field.absent is False
