"""Ends a run, or rolls it back, after updates refused one after another."""

from collections import deque
import logging

import jax
import numpy as np

from trainers.callbacks.callback import Callback
from trainers.metrics import Last, Metric, Metrics

log = logging.getLogger(__name__)

_METRICS = ('skipped_updates', 'train/loss', 'gradient_norm')


class RefusedUpdates(Callback):
  """Callback that acts on refused updates: not finite, or a spike of the loss.

  After `patience` refused updates in a row, the run rolls back to the newest
  good checkpoint and continues with unseen data. If it has rolled back
  `max_rollbacks` times, or has no good checkpoint, it stops as diverged.

  Args:
    patience: Number of refused updates in a row, >= 0. 0 disables the action;
      refused updates are still logged.
    max_rollbacks: Number of rollbacks before the run stops, >= 0.
  """

  # Name of an earlier version: checkpoints have it.
  state_name = 'StopOnNonFinite'

  # Steps between an update and the reading of its metrics. The update has
  # finished by then, so reading does not wait.
  DELAY = 2

  def __init__(self, patience: int, max_rollbacks: int = 0):
    """Raises ValueError if an argument is negative."""
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
    """Logs updates that were refused `DELAY` steps ago, and acts on them."""
    metrics = {name: loop.metrics[name] for name in _METRICS}
    self._pending.append((loop.step, metrics))
    is_last = loop.step == loop.num_train_steps
    while len(self._pending) > (0 if is_last else self.DELAY):
      step, metrics = self._pending.popleft()
      num_skipped = int(_to_float(metrics['skipped_updates']))
      is_refused = num_skipped > self.num_skipped
      self.num_skipped = num_skipped
      self.num_in_a_row = self.num_in_a_row + 1 if is_refused else 0
      if is_refused:
        log.warning(
          'step %d: update refused: loss %.4g, gradient norm %.4g',
          step,
          _to_float(metrics['train/loss']),
          _to_float(metrics['gradient_norm']),
        )
      if self.patience and self.num_in_a_row >= self.patience:
        self._act(loop)
        return

  def _act(self, loop) -> None:
    """Rolls back, which raises, or stops the run as diverged."""
    reason = f'{self.num_in_a_row} updates in a row were refused'
    if loop.num_rollbacks < self.max_rollbacks:
      loop.roll_back(reason)
    if self.max_rollbacks:
      reason += f', after {loop.num_rollbacks} rollbacks'
    loop.stop(reason, 'diverged')

  def state_dict(self):
    """Returns the counts, and the metrics of steps not yet read."""
    return {
      'num_in_a_row': self.num_in_a_row,
      'num_skipped': self.num_skipped,
      'pending': [
        [step, {name: _to_float(m) for name, m in metrics.items()}]
        for step, metrics in self._pending
      ],
    }

  def load_state_dict(self, state):
    """Restores the result of `state_dict`."""
    self.num_in_a_row = state['num_in_a_row']
    self.num_skipped = state['num_skipped']
    self._pending = deque(
      (step, {name: Last(np.float64(x)) for name, x in metrics.items()})
      for step, metrics in state['pending']
    )


def _to_float(metric: Metric) -> float:
  """Returns the value of a metric that may be on the device."""
  return float(jax.device_get(metric).compute())
