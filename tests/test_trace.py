"""Traces of routing against the routers, and the cost of the hook: nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import task as task_lib
from nanomoe.inspection import trace as trace_lib
from nanomoe.model import stack
from nanomoe.model.build import layers_with_experts, resolve_auto
from nanomoe.moe.dispatch.registry import DISPATCH
from nanomoe.moe.layer import MoE
from nanomoe.moe.routers import ROUTERS
from tests.shrunk import mostly_slow
from trainers.errors import UserError
from trainers.runtime import keys

VOCAB, BLOCK = 11, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 43).astype(np.int32)


@pytest.fixture
def build(tiny):
  """build(changes) -> config, task, params and model_state."""

  def make(changes, is_abstract=False):
    config = resolve_auto(tiny({'block_size': BLOCK, **changes}))
    task = task_lib.build_task(config, VOCAB)
    batch = {'inputs': np.zeros((1, BLOCK), np.int32)}
    if is_abstract:  # Nothing is compiled.
      return config, task, *jax.eval_shape(task.init, keys.make(0), batch)
    return config, task, *task.init(keys.make(0), batch)

  return make


def _trace(built, **arguments):
  _, task, params, state = built
  arguments = {'block_size': BLOCK, 'batch_size': 2, **arguments}
  return trace_lib.trace(task, params, state, TOKENS, **arguments)


def _reports(built):
  """Yields the mask and the report of each batch, of another code path."""
  _, task, params, state = built
  key = keys.make(0)
  run = jax.jit(lambda b: task._apply(params, state, b, key, False, None)[1])
  for inputs, mask in trace_lib._batches(TOKENS, BLOCK, 2, False):
    batch = {'inputs': jnp.asarray(inputs), 'weights': jnp.float32(mask)}
    yield mask.ravel(), run(batch)


@pytest.mark.parametrize('router', mostly_slow(ROUTERS, 'TopK'))
def test_trace_has_the_choices_that_the_model_reports(build, router):
  """Loads, first choices and tokens agree with the aux of the model."""
  built = build({'moe.router.type': router, 'moe.top_k': 2})
  found = _trace(built)
  assert found.layers == (0, 1)
  assert found.experts.shape == found.weights.shape == found.computed.shape
  loads, start = 0, 0
  for mask, aux in _reports(built):
    loads = loads + np.asarray(aux.load)
    size = mask.sum()
    own = found.experts[:, start : start + size]
    if aux.token is None:
      np.testing.assert_array_equal(own, np.asarray(aux.expert)[:, mask])
    else:
      for layer in range(2):
        wanted = sorted(
          (int(t), int(e))
          for t, e in zip(
            aux.token[layer], aux.expert[layer, :, 0], strict=True
          )
          if e < 4
        )
        pairs = [
          (t, int(e)) for t in range(size) for e in own[layer, t] if e < 4
        ]
        assert sorted(pairs) == wanted
    start += size
  counts = [np.bincount(x.ravel(), minlength=5)[:4] for x in found.experts]
  np.testing.assert_array_equal(counts, loads)
  assert ((found.weights > 0) == (found.experts < 4)).all()
  assert (found.computed == (found.experts < 4)).all()
  # Empty choices are last. Choices of experts are sorted by weight.
  used = found.experts < 4
  assert (used[..., :-1] >= used[..., 1:]).all()
  if router == 'ExpertChoice':
    assert (np.diff(found.weights, axis=-1) <= 0).all()


@pytest.mark.parametrize('dispatch', mostly_slow(DISPATCH))
def test_every_dispatch_gives_the_same_trace_and_drops_what_it_reports(
  build, dispatch
):
  changes = {'moe.dispatch': dispatch, 'moe.capacity_factor': 0.5}
  built = build(changes)
  factor = 0.5 if dispatch == 'capacity' else None
  found = _trace(built, capacity_factor=factor)
  reference = _trace(build({'moe.dispatch': 'dense'}))
  # Later layers see what the first one dropped.
  np.testing.assert_array_equal(found.experts[0], reference.experts[0])
  dropped = sum(
    np.asarray(aux.metrics['dropped_fraction'].total)
    for _, aux in _reports(built)
  )
  np.testing.assert_array_equal((~found.computed).sum(axis=(1, 2)), dropped)
  assert dropped.any() == (dispatch == 'capacity')


@pytest.mark.parametrize(('is_full', 'windows'), [(True, 4), (False, 1)])
def test_a_short_text_fills_a_batch_if_rows_matter(is_full, windows):
  ((inputs, mask),) = trace_lib._batches(TOKENS[:3], BLOCK, 4, is_full)
  assert inputs.shape == mask.shape == (windows, BLOCK)
  np.testing.assert_array_equal(inputs.ravel()[:3], TOKENS[:3])
  assert mask.sum() == 3


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {
      'model.num_layers': 5,
      'moe.first_dense_layers': 1,
      'moe.every': 2,
      'moe.num_shared': 1,
    },
  ],
)
def test_scanned_layers_are_traced_as_unrolled_ones(build, changes):
  config, _, params, state = built = build(changes)
  found = _trace(built)
  assert found.layers == tuple(layers_with_experts(config))
  _, scanned, *_ = build({**changes, 'model.scan_layers': True})
  model = scanned.model
  stacked = stack.stack(params, model.num_unrolled, model.period)
  again = _trace((config, scanned, stacked, state))
  assert again.layers == found.layers
  np.testing.assert_array_equal(again.experts, found.experts)
  np.testing.assert_allclose(again.weights, found.weights, atol=1e-5)


@pytest.mark.parametrize(
  'scan', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_training_is_the_same_program_with_and_without_the_hook(
  build, scan, monkeypatch
):
  """The jaxprs of loss and gradient are equal, text by text."""
  _, task, params, state = build({'model.scan_layers': scan}, is_abstract=True)
  ones = np.ones((2, BLOCK), np.float32)
  ids = jnp.zeros((2, BLOCK), jnp.int32)
  batch = {'inputs': ids, 'targets': ids, 'weights': ones}

  def program():
    def loss(params, state):
      return task.loss(params, state, batch, keys.make(0), train=True)[0].sum

    return str(jax.make_jaxpr(jax.grad(loss))(params, state))

  with_hook = program()
  monkeypatch.setattr(MoE, 'sow', lambda *_: pytest.fail('no') or False)
  with pytest.raises(pytest.fail.Exception):
    program()
  monkeypatch.setattr(MoE, 'sow', lambda *_: False)
  assert program() == with_hook


def test_a_model_without_experts_and_an_empty_text_are_named(build):
  _, *rest = build({'moe.first_dense_layers': 2})
  with pytest.raises(UserError, match='no layer'):
    trace_lib.trace(*rest, TOKENS, block_size=BLOCK)
  with pytest.raises(UserError, match='no tokens'):
    trace_lib.trace(*rest, TOKENS[:0], block_size=BLOCK)


def test_positions_begin_again_in_each_window(build):
  found = _trace(build({}))
  np.testing.assert_array_equal(found.positions, np.arange(43) % BLOCK)
  np.testing.assert_array_equal(found.tokens, TOKENS)
  assert jnp.isfinite(found.weights).all()
