"""configs/base.py, or a change of it, as a step that tells its seconds."""

import time

import jax
import numpy as np

from benchmarks import products
from configs import base
from nanomoe import config as config_lib
from nanomoe import experiment, optimizers
from trainers import step as step_lib
from trainers.state import TrainState

VOCAB_SIZE = 65


class Variant:
  """A training step with its state, on one batch of random tokens.

  Args:
    changes: {config key: value}.
  """

  def __init__(self, changes: dict[str, str]):
    config = config_lib.apply(base.get_config(), list(changes.items()))
    self.config = experiment.decide(config)
    self.task = experiment.build_task(self.config, VOCAB_SIZE)
    optimizer, schedule = optimizers.build(config.optimizer, 5000)
    shape = (config.batch_size, config.block_size + 1)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, shape, np.int32)
    self.batch = jax.device_put(
      {
        'inputs': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'weights': np.ones((shape[0], shape[1] - 1), np.float32),
      }
    )
    self.key = jax.random.key(0)
    self.state = jax.jit(
      lambda key: TrainState.create(*self.task.init(key, self.batch), optimizer)
    )(self.key)
    self.step = step_lib.make_train_step(self.task, optimizer, schedule)
    self.jitted = jax.jit(self.step, donate_argnums=0)

  def __call__(self) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    self.state, _ = self.jitted(self.state, self.batch, self.key)
    jax.block_until_ready(self.state)
    return time.perf_counter() - start

  def flops(self) -> int:
    return products.count(self.step, self.state, self.batch, self.key)
