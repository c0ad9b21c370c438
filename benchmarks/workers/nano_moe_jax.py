"""Times nano-moe-jax as its own functions run, on random tokens.

Runs in its environment. With a file as argument, trains on it for 20 steps
instead, with two evaluations of 5 batches: what its memory is measured of.
"""

import dataclasses
import sys
import time

import jax
from nano_moe import NanoMoE, NanoMoEConfig, load_text_data
from nano_moe.train import create_train_state, eval_step, train, train_step
import numpy as np
from serve import serve

CONFIG = NanoMoEConfig(vocab_size=65)


def _batch():
  shape = (CONFIG.batch_size, CONFIG.block_size + 1)
  tokens = np.random.default_rng(0).integers(0, 65, shape, np.int32)
  return jax.device_put((tokens[:, :-1], tokens[:, 1:]))


def step():
  x, y = _batch()
  state = create_train_state(jax.random.key(0), CONFIG)

  def once() -> float:
    nonlocal state
    start = time.perf_counter()
    state, _ = train_step(state, x, y, CONFIG)
    jax.block_until_ready(state.params)
    return time.perf_counter() - start

  return lambda n: [once() for _ in range(n)]


def evaluation():
  x, y = _batch()
  state = create_train_state(jax.random.key(0), CONFIG)

  def run(n: int) -> list[float]:
    start = time.perf_counter()
    for _ in range(n):
      float(eval_step(state, x, y, CONFIG)['loss'])  # As its loop does.
    return [(time.perf_counter() - start) / n]

  return run


def generation():
  state = create_train_state(jax.random.key(0), CONFIG)
  model = NanoMoE(CONFIG)

  def run(n: int) -> list[float]:
    start = time.perf_counter()
    prompt = jax.numpy.zeros((1, 1), 'int32')
    text = model.generate(state.params, jax.random.key(0), prompt, n)
    text.block_until_ready()
    return [time.perf_counter() - start]

  return run


def _train(path: str) -> None:
  data, val, vocab_size, _, _ = load_text_data(path)
  config = dataclasses.replace(
    CONFIG, vocab_size=vocab_size, max_iters=20, eval_interval=20, eval_iters=5
  )
  state = create_train_state(jax.random.key(0), config)
  train(state, config, data, val, jax.random.key(1))


if __name__ == '__main__':
  if sys.argv[1:]:
    _train(sys.argv[1])
  else:
    serve({'step': step, 'evaluation': evaluation, 'generation': generation})
