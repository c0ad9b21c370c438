"""The smallest task and data that a Trainer takes: a linear regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainers.checkpoint.checkpointer import Checkpointer
from trainers.metrics import Mean
from trainers.task import Aux, Total
from trainers.trainer import Trainer

BATCH_SIZE = 8


class Regression:
  """y = x w + b by weighted squares; `noise` on y, from the step's key."""

  def __init__(self, noise: float = 0.0):
    self.noise = noise

  def init(self, key, batch):
    w = jax.random.normal(key, batch['x'].shape[1:])
    return {'w': w, 'b': jnp.zeros(())}, {'rows': jnp.zeros(())}

  def loss(self, params, model_state, batch, key, *, train):
    del model_state
    y = batch['y']
    if train:
      y = y + self.noise * jax.random.normal(key, y.shape)
    errors = batch['x'] @ params['w'] + params['b'] - y
    weight = batch['weight'].sum()
    total = jnp.sum(batch['weight'] * errors**2)
    return Total(total, weight), Aux({'mse': Mean(total, weight)}, weight)

  def advance(self, model_state, statistics):
    return {'rows': model_state['rows'] + statistics}


class Rows:
  """Batches of random rows, weighted 1 to 3.

  Args:
    poison: {batch index: what y is there}, to make updates not finite.
    during_eval: called between two batches of each evaluation.
  """

  fingerprint = 'rows'

  def __init__(self, poison=None, during_eval=lambda: None):
    self.poison = poison or {}
    self.during_eval = during_eval

  def batch(self, index):
    random = np.random.Generator(np.random.Philox(key=index))
    x = random.normal(size=(BATCH_SIZE, 3)).astype(np.float32)
    noise = random.normal(size=BATCH_SIZE)
    y = (x @ [1.0, -2.0, 3.0] + 0.5 + 0.1 * noise).astype(np.float32)
    weight = random.integers(1, 4, BATCH_SIZE).astype(np.float32)
    return {'x': x, 'y': y, 'weight': weight}

  def train_batch(self, index, rows):
    batch = self.batch(index)
    if index in self.poison:
      batch['y'] = np.full_like(batch['y'], self.poison[index])
    return {name: values[rows] for name, values in batch.items()}

  def eval_batches(self, split, rows):
    for index in range(3):
      if index == 2:
        self.during_eval()
      batch = self.batch(1000 + index)
      yield {name: values[rows] for name, values in batch.items()}


def make_trainer(workdir=None, *, keep_latest=2, **changes) -> Trainer:
  """Of 11 steps; with checkpoints where there is a workdir."""
  if workdir and 'checkpointer' not in changes:
    directory = workdir.absolute() / 'checkpoints'
    changes['checkpointer'] = Checkpointer(directory, keep_latest)
  arguments = {
    'task': Regression(),
    'dataset': Rows(),
    'optimizer': optax.adam(0.05),
    'schedule': optax.constant_schedule(0.05),
    'num_train_steps': 11,
    'batch_size': BATCH_SIZE,
    'log_interval': 3,
    'workdir': workdir,
  }
  return Trainer(**{**arguments, **changes})


def host(tree):
  """A copy of `tree` in NumPy that no donation can take away."""
  return jax.tree.map(lambda x: np.array(x, copy=True), tree)


def bits(tree) -> list:
  """[(path, type, shape, bytes)]: equal if and only if bitwise equal."""
  return [
    (jax.tree_util.keystr(path), str(x.dtype), x.shape, np.asarray(x).tobytes())
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]


def mean_square(params, batches) -> float:
  """The weighted mean square of the errors, by NumPy in float64."""
  total = count = 0.0
  for batch in batches:
    x = batch['x'].astype(np.float64)
    errors = x @ np.asarray(params['w'], np.float64) - batch['y']
    errors += float(params['b'])
    total += float(np.sum(batch['weight'] * errors**2))
    count += float(batch['weight'].sum())
  return total / count
