"""The whole stack learns a source of known entropy, and not less than it."""

import numpy as np
import pytest

from nanomoe import experiment, optimizers
from nanomoe.data import pipeline as text_lib
from trainers import callbacks
from trainers.trainer import Trainer

NUM_SYMBOLS = 6


def _second_order_source(length: int, rng):
  """Tokens whose law is given by the two before them, and that law."""
  law = rng.dirichlet(np.full(NUM_SYMBOLS, 0.4), (NUM_SYMBOLS, NUM_SYMBOLS))
  tokens = np.zeros(length, np.int32)
  uniform = rng.random(length)
  cumulative = law.cumsum(axis=-1)
  for t in range(2, length):
    row = cumulative[tokens[t - 2], tokens[t - 1]]
    tokens[t] = min(np.searchsorted(row, uniform[t]), NUM_SYMBOLS - 1)
  return tokens, law


@pytest.mark.slow
@pytest.mark.optimized
def test_reaches_the_entropy_of_its_source(tiny, rng):
  """Within 2 % of the entropy of the validation text under its true law."""
  tokens, law = _second_order_source(60_000, rng)
  config = experiment.resolve_auto(
    tiny(
      {
        'num_train_steps': 500,
        'batch_size': 32,
        'block_size': 32,
        'eval_iters': 0,
        'model.d_model': 32,
        'model.dropout_rate': 0.0,
        'moe.d_ff': 64,
        'optimizer.learning_rate': 1e-2,
        'optimizer.schedule.type': 'warmup_cosine',
        'optimizer.schedule.warmup_steps': 50,
      }
    )
  )
  dataset = text_lib.build_dataset(config, text_lib.split(tokens))
  task = experiment.build_task(config, NUM_SYMBOLS)
  optimizer, schedule = optimizers.build(
    config.optimizer, config.num_train_steps
  )
  trainer = Trainer(
    task,
    dataset,
    optimizer,
    schedule=schedule,
    num_train_steps=config.num_train_steps,
    batch_size=config.batch_size,
    callbacks=[callbacks.Evaluation(250, monitor='cross_entropy')],
  )
  assert trainer.fit() == 'done'

  # A window's first target has one predecessor, the others have both.
  val = dataset.splits['val']
  first, second, third = val[:-2], val[1:-1], val[2:]
  entropy = -np.mean(np.log(law[first, second, third]))
  pairs = np.histogram2d(second, third, bins=NUM_SYMBOLS)[0]
  of_one = pairs / pairs.sum(axis=1, keepdims=True)
  entropy_of_one = -np.mean(np.log(of_one[second, third]))
  floor = entropy_of_one + (config.block_size - 1) * entropy
  floor /= config.block_size
  assert entropy_of_one > 1.2 * entropy  # Attention is needed.
  # Below the floor it would have seen what it must not.
  assert 0.99 * floor < trainer.score.value < 1.02 * floor
