"""Times this project: configs/base.py, on random tokens."""

import functools
import time
from types import ModuleType

from benchmarks.variant import Variant
from benchmarks.workers.serve import serve
from configs import mixtral_nano, qwen3_nano
from nanomoe.sampling import Generator, Sampling
from trainers.evaluator import Evaluator


def step(precision: str = 'auto'):
  variant = Variant({'precision': precision})
  return lambda n: [variant() for _ in range(n)]


def nano_step(module: ModuleType):
  """Times a step of a nano config on base.py's batch, without dropout."""
  changes = {
    'batch_size': '32',
    'block_size': '128',
    'model.dropout_rate': '0',
  }
  variant = Variant(changes, module.get_config())
  return lambda n: [variant() for _ in range(n)]


def evaluation():
  """Seconds a batch, of a pass over n batches."""
  variant = Variant({})
  evaluate = Evaluator(variant.task)

  def run(n: int) -> list[float]:
    start = time.perf_counter()
    state = variant.state
    evaluate(state.params, state.model_state, [variant.batch] * n)
    return [(time.perf_counter() - start) / n]

  return run


def generation():
  """Seconds of a text of n characters."""
  variant = Variant({})
  trained = variant.state.params, variant.state.model_state
  generator = Generator(variant.task.logits, trained, variant.config.block_size)

  def run(n: int) -> list[float]:
    start = time.perf_counter()
    for _ in generator([[0]], n, Sampling(0.8, 40), 0):
      pass
    return [time.perf_counter() - start]

  return run


if __name__ == '__main__':
  serve(
    {
      'step': step,
      'step_float32': functools.partial(step, 'float32'),
      'evaluation': evaluation,
      'generation': generation,
      'mixtral': functools.partial(nano_step, mixtral_nano),
      'qwen3_moe': functools.partial(nano_step, qwen3_nano),
    }
  )
