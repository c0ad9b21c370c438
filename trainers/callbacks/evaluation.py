"""Periodic evaluation, with the best score so far."""

import logging
import math

from trainers.callbacks.callback import Callback
from trainers.metrics import Score

log = logging.getLogger(__name__)


class Evaluation(Callback):
  """Callback that evaluates periodically and after the last step.

  It sets `loop.score` and `loop.best` from the monitored metric, and adds
  '<split>/best_<monitor>' to the metrics. Lower is better. A value that is not
  finite is never the best.

  Args:
    every_steps: Steps between two evaluations.
    monitor: Name of the monitored metric, without the split.
    split: Split to evaluate on.
  """

  def __init__(self, every_steps: int, monitor: str, split: str = 'val'):
    self.every_steps = every_steps
    self.monitor = monitor
    self.split = split

  def on_train_step_end(self, loop):
    if loop.step % self.every_steps == 0 or loop.step == loop.num_train_steps:
      loop.evaluate(self.split)

  def on_eval_end(self, loop, split, metrics):
    if split != self.split:
      return
    loop.score = Score(loop.step, metrics[f'{split}/{self.monitor}'])
    best = math.isfinite(loop.score.value) and (
      loop.best is None or loop.score.value < loop.best.value
    )
    if best:
      loop.best = loop.score
    names = [f'{split}/{self.monitor}', *sorted(metrics)]
    scalars = '  '.join(
      f'{name.removeprefix(f"{split}/")} {metrics[name]:.4f}'
      for name in dict.fromkeys(names)
      if isinstance(metrics[name], float) and '/best_' not in name
    )
    log.info(
      'step %*d/%d  %s  %s%s',
      len(str(loop.num_train_steps)),
      loop.step,
      loop.num_train_steps,
      split,
      scalars,
      '  ★' if best else '',
    )
    if loop.best:
      metrics[f'{split}/best_{self.monitor}'] = loop.best.value
