"""A run whose updates are no longer finite ends."""

from collections import deque
import logging

import jax
import numpy as np

from trainers.callbacks.callback import Callback
from trainers.metrics import Last, Metric

log = logging.getLogger(__name__)


class StopOnNonFinite(Callback):
  """Stops, as diverged, after `patience` refused updates in a row; 0: never."""

  # Steps are looked at when they are this old: they are done by then.
  DELAY = 2

  def __init__(self, patience: int):
    if patience < 0:
      raise ValueError(f'{patience=} must be >= 0')
    self.patience = patience
    self.num_in_a_row = 0
    self.num_skipped = 0
    self._pending: deque[tuple[int, Metric]] = deque()

  def on_train_step_end(self, loop):
    self._pending.append((loop.step, loop.metrics['skipped_updates']))
    last = loop.step == loop.num_train_steps
    while len(self._pending) > (0 if last else self.DELAY):
      step, num_skipped = self._pending.popleft()
      num_skipped = _number(num_skipped)
      refused = num_skipped > self.num_skipped
      self.num_skipped = num_skipped
      self.num_in_a_row = self.num_in_a_row + 1 if refused else 0
      if refused:
        log.warning('step %d: the update is not finite; it was refused', step)
      if self.patience and self.num_in_a_row >= self.patience:
        loop.stop(
          f'{self.num_in_a_row} updates in a row were not finite', 'diverged'
        )
        return

  def state_dict(self):
    return {
      'num_in_a_row': self.num_in_a_row,
      'num_skipped': self.num_skipped,
      'pending': [[step, _number(n)] for step, n in self._pending],
    }

  def load_state_dict(self, state):
    self.num_in_a_row = state['num_in_a_row']
    self.num_skipped = state['num_skipped']
    self._pending = deque(
      (step, Last(np.int32(n))) for step, n in state['pending']
    )


def _number(metric: Metric) -> int:
  return int(jax.device_get(metric).compute())
