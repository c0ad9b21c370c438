"""Steps of configs, lowered from shapes for platforms without a device."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parity
from nanomoe import experiment, optimizers
from nanomoe.config import overrides as config_lib
from nanomoe.model import parameters
from nanomoe.moe.dispatch.registry import DISPATCH
from tests.test_architecture import CONFIGS, _shrunk
from trainers import step as step_lib
from trainers.mesh import Placement, make_mesh
from trainers.state import TrainState

NUM_TOKENS = 50_257
# Platforms of XLA, by what jax.default_backend() returns on them.
PLATFORMS = {'gpu': ('cuda', 'rocm'), 'tpu': ('tpu',), 'cpu': ('cpu',)}
DEVICES = [backend for backend in PLATFORMS if backend != 'cpu']
# XLA's partitioner, which every platform has, replaces it.
PARTITIONING = 'CustomSPMDPartitioning'
SMALL = {'model.num_layers': 1, 'precision': 'auto'}


@pytest.fixture
def on_backend(monkeypatch):
  """on_backend(name) makes code that asks for the backend believe it."""

  def pretend(name):
    # A trace of another backend must not be used again.
    jax.clear_caches()
    monkeypatch.setattr(jax, 'default_backend', lambda: name)

  yield pretend
  monkeypatch.undo()
  jax.clear_caches()


def _traced(config, num_tokens, mesh=None):
  """Returns the traced step and the shapes of its state.

  No array is allocated: parameters, optimizer and batch are shapes.
  """
  task = experiment.build_task(config, num_tokens, mesh=mesh)
  optimizer, schedule = optimizers.build(
    config.optimizer, config.num_train_steps
  )
  shape = config.batch_size, config.block_size
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype)
    for name, dtype in (
      ('inputs', jnp.int32),
      ('targets', jnp.int32),
      ('weights', jnp.float32),
    )
  }
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(
    lambda key, batch: TrainState.create(*task.init(key, batch), optimizer),
    key,
    batch,
  )
  if mesh:
    placement = Placement(mesh, parameters.axes)
    state = placement.abstract(state, placement.shardings(state))
    rows = dict.fromkeys(batch, placement.batch)
    batch = placement.abstract(batch, rows)
    key = placement.abstract(key)
  step = step_lib.make_train_step(
    task, optimizer, schedule, accumulate_steps=config.accumulate_steps
  )
  return jax.jit(step).trace(state, batch, key), state


def _custom_calls(traced, platform):
  """Returns the targets of all custom calls in the lowered program."""
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert 'func.func public @main' in text
  return set(re.findall(r'custom_call @([\w.$]+)', text))


@pytest.mark.parametrize(
  'name, millions, active',
  [
    pytest.param('gpu_300m', 298, 118, marks=pytest.mark.slow),
    pytest.param('gpu_1b', 1013, 264, marks=pytest.mark.slow),
  ],
)
def test_the_step_of_a_large_config_is_lowered(name, millions, active):
  module = importlib.import_module(f'configs.{name}')
  config = experiment.resolve_auto(config_lib.apply(module.get_config(), []))
  traced, state = _traced(config, NUM_TOKENS)
  counts = parameters.count(state.params, config.moe.top_k)
  assert round(counts['num_params'] / 1e6) == millions
  assert round(counts['num_active_params'] / 1e6) == active
  assert f'{active} million' in ' '.join(module.__doc__.split())
  text = traced.lower().as_text()
  # The logits of no more than a chunk of each sequence exist.
  shape = config.batch_size, config.block_size
  chunk = config.model.logits_chunk
  assert f'tensor<{shape[0] * chunk}x50304xf32>' in text
  assert f'{shape[1]}x50304' not in text
  assert f'{np.prod(shape)}x50304' not in text


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
@pytest.mark.parametrize('name', CONFIGS)
def test_the_step_of_a_config_is_lowered(name, backend, corpus, on_backend):
  """No custom call is in the program, because some exist on CPUs alone."""
  on_backend(backend)
  config = experiment.resolve_auto(_shrunk(name, corpus))
  traced, _ = _traced(config, parity.VOCAB_SIZE)
  for platform in PLATFORMS[backend]:
    assert not _custom_calls(traced, platform)


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', DISPATCH)
def test_the_step_of_a_dispatch_is_lowered(dispatch, tiny, on_backend):
  """Layouts are constrained on CPUs alone; others round to bfloat16."""
  for backend in PLATFORMS if dispatch == 'dropless' else DEVICES:
    on_backend(backend)
    config = experiment.resolve_auto(tiny({**SMALL, 'moe.dispatch': dispatch}))
    traced, _ = _traced(config, parity.VOCAB_SIZE)
    for platform in PLATFORMS[backend]:
      found = _custom_calls(traced, platform)
      assert found == ({'LayoutConstraint'} if backend == 'cpu' else set())
    if backend != 'cpu':
      assert config.precision == 'bfloat16'


@pytest.mark.slow
@pytest.mark.parametrize('backend', DEVICES)
@pytest.mark.parametrize('dispatch', DISPATCH)
def test_the_step_on_a_mesh_is_lowered(dispatch, backend, on_backend):
  mesh = make_mesh({'data': 2, 'expert': 2, 'tensor': 2})
  sizes = {f'mesh.{axis}': size for axis, size in mesh.shape.items()}
  changes = {**sizes, **SMALL, 'moe.dispatch': dispatch}
  on_backend(backend)
  traced, _ = _traced(parity.make_config(changes), parity.VOCAB_SIZE, mesh)
  for platform in PLATFORMS[backend]:
    assert _custom_calls(traced, platform) == {PARTITIONING}
