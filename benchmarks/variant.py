"""A training step by itself: its work, and its seconds."""

import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from configs import base
from nanomoe import experiment, optimizers
from nanomoe.config import overrides as config_lib
from nanomoe.config.schema import Config
from nanomoe.model import parameters
from nanomoe.planning import products
from trainers import step as step_lib
from trainers.mesh import Placement, make_mesh
from trainers.state import TrainState
from trainers.task import Task

VOCAB_SIZE = 65


def flops(config: Config, vocab_size: int) -> int:
  """Of a step's matrix products, as traced, where loads of experts are even.

  Nothing is computed.
  """
  task = experiment.build_task(experiment.resolve_auto(config), vocab_size)
  step, create, batch = _program(config, task, vocab_size)
  key = jax.random.key(0)
  state = jax.eval_shape(create, key)
  return products.count(step, state, batch, key, trips=0)


class Variant:
  """Training step of a config on one batch of random tokens.

  Args:
    changes: Values of config keys that replace those of the config.
    config: The config; None for configs/base.py.
    vocab_size: Number of tokens.
  """

  def __init__(
    self,
    changes: dict[str, str],
    config: ConfigDict | None = None,
    vocab_size: int = VOCAB_SIZE,
  ):
    config = config_lib.apply(
      config or base.get_config(), list(changes.items())
    )
    self.config = experiment.resolve_auto(config)
    mesh = make_mesh(config.mesh.to_dict())
    placement = Placement(mesh, parameters.axes)
    self.task = experiment.build_task(self.config, vocab_size, mesh=mesh)
    self.step, create, batch = _program(config, self.task, vocab_size)
    rows = placement.rows(self.config.batch_size)
    self.batch = placement.put_batch({k: x[rows] for k, x in batch.items()})
    self.key = placement.put(jax.random.key(0))
    shardings = placement.shardings(jax.eval_shape(create, self.key))
    self.state = jax.jit(create, out_shardings=shardings)(self.key)
    self.jitted: Any = jax.jit(
      self.step,
      donate_argnums=0,
      out_shardings=(shardings, placement.replicated),
    )

  def __call__(self) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    self.state, _ = self.jitted(self.state, self.batch, self.key)
    jax.block_until_ready(self.state)
    return time.perf_counter() - start

  def compile(self) -> jax.stages.Compiled:
    """Returns the compiled step, which later calls run.

    The step donates the state.
    """
    compiled = self.jitted.lower(self.state, self.batch, self.key).compile()
    self.jitted = compiled
    return compiled

  def flops(self) -> int:
    """As of the function."""
    return products.count(self.step, self.state, self.batch, self.key, trips=0)


def _program(
  config: Config, task: Task, vocab_size: int
) -> tuple[Any, Any, Any]:
  """The step, what makes its state of a key, and a batch."""
  optimizer, schedule = optimizers.build(
    config.optimizer, config.num_train_steps
  )
  shape = (config.batch_size, config.block_size + 1)
  tokens = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
  batch = {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones((shape[0], shape[1] - 1), np.float32),
  }

  def create(key: jax.Array) -> TrainState:
    return TrainState.create(*task.init(key, batch), optimizer)

  step = step_lib.make_train_step(
    task, optimizer, schedule, accumulate_steps=config.accumulate_steps
  )
  return step, create, batch
