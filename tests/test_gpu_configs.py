"""Configs for GPUs: their sizes, and their step, traced from shapes alone."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment, optimizers
from nanomoe.config import overrides as config_lib
from nanomoe.model import parameters
from trainers import step as step_lib
from trainers.state import TrainState

NUM_TOKENS = 50_257


@pytest.mark.parametrize(
  'name, millions, active',
  [('gpu_300m', 298, 118), ('gpu_1b', 1013, 264)],
)
def test_the_step_of_a_large_config_is_lowered(name, millions, active):
  """No array is allocated: parameters, optimizer and batch are shapes."""
  module = importlib.import_module(f'configs.{name}')
  config = experiment.resolve_auto(config_lib.apply(module.get_config(), []))
  task = experiment.build_task(config, NUM_TOKENS)
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
  counts = parameters.count(state.params, config.moe.top_k)
  assert round(counts['num_params'] / 1e6) == millions
  assert round(counts['num_active_params'] / 1e6) == active
  assert f'{active} million' in ' '.join(module.__doc__.split())
  step = step_lib.make_train_step(task, optimizer, schedule)
  text = jax.jit(step).lower(state, batch, key).as_text()
  # The logits of no more than a chunk of each sequence exist.
  chunk = config.model.logits_chunk
  assert f'tensor<{shape[0] * chunk}x50304xf32>' in text
  assert f'{shape[1]}x50304' not in text
  assert f'{np.prod(shape)}x50304' not in text
