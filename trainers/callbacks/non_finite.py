"""A run whose updates are refused, one after another, ends or goes back."""

from collections import deque
import logging

import jax
import numpy as np

from trainers.callbacks.callback import Callback
from trainers.metrics import Last, Metric, Metrics

log = logging.getLogger(__name__)

_READ = ('skipped_updates', 'train/loss', 'gradient_norm')


class StopOnNonFinite(Callback):
  """Acts on `patience` refused updates in a row; 0: never.

  The run goes back to the newest good checkpoint, and on with data that it had
  not seen, `max_rollbacks` times; then, or without such a checkpoint, it stops
  as diverged.
  """

  # Steps are looked at when they are this old: they are done by then.
  DELAY = 2

  def __init__(self, patience: int, max_rollbacks: int = 0):
    for name, value in (
      ('patience', patience),
      ('max_rollbacks', max_rollbacks),
    ):
      if value < 0:
        raise ValueError(f'{name}={value} must be >= 0')
    self.patience = patience
    self.max_rollbacks = max_rollbacks
    self.num_in_a_row = 0
    self.num_skipped = 0
    self._pending: deque[tuple[int, Metrics]] = deque()

  def on_train_step_end(self, loop):
    metrics = {name: loop.metrics[name] for name in _READ}
    self._pending.append((loop.step, metrics))
    last = loop.step == loop.num_train_steps
    while len(self._pending) > (0 if last else self.DELAY):
      step, metrics = self._pending.popleft()
      num_skipped = int(_number(metrics['skipped_updates']))
      refused = num_skipped > self.num_skipped
      self.num_skipped = num_skipped
      self.num_in_a_row = self.num_in_a_row + 1 if refused else 0
      if refused:
        log.warning(
          'step %d: the update was refused: loss %.4g, gradient norm %.4g',
          step,
          _number(metrics['train/loss']),
          _number(metrics['gradient_norm']),
        )
      if self.patience and self.num_in_a_row >= self.patience:
        self._act(loop)
        return

  def _act(self, loop) -> None:
    reason = f'{self.num_in_a_row} updates in a row were refused'
    if loop.num_rollbacks < self.max_rollbacks:
      loop.roll_back(reason)
    if self.max_rollbacks:
      reason += f', after {loop.num_rollbacks} rollbacks'
    loop.stop(reason, 'diverged')

  def state_dict(self):
    return {
      'num_in_a_row': self.num_in_a_row,
      'num_skipped': self.num_skipped,
      'pending': [
        [step, {name: _number(m) for name, m in metrics.items()}]
        for step, metrics in self._pending
      ],
    }

  def load_state_dict(self, state):
    self.num_in_a_row = state['num_in_a_row']
    self.num_skipped = state['num_skipped']
    self._pending = deque(
      (step, {name: Last(np.float64(x)) for name, x in metrics.items()})
      for step, metrics in state['pending']
    )


def _number(metric: Metric) -> float:
  return float(jax.device_get(metric).compute())
