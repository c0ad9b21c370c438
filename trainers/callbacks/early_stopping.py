"""Callback that stops a run whose evaluations stop improving."""

from trainers.callbacks.callback import Callback


class EarlyStopping(Callback):
  """Callback that stops after `patience` evaluations without a new best.

  Args:
    patience: Number of evaluations; 0 disables early stopping.
    split: Split of the evaluations.

  Raises:
    ValueError: `patience` is negative.
  """

  def __init__(self, patience: int, split: str = 'val'):
    if patience < 0:
      raise ValueError(f'{patience=} must be >= 0')
    self.patience = patience
    self.split = split
    self.num_worse = 0

  def on_eval_end(self, loop, split, metrics):
    if split != self.split:
      return
    self.num_worse = 0 if loop.best == loop.score else self.num_worse + 1
    self._maybe_stop(loop)

  def on_fit_start(self, loop):
    self._maybe_stop(loop)  # A run that stopped early does not train on resume.

  def _maybe_stop(self, loop) -> None:
    if self.patience and self.num_worse >= self.patience:
      best = f'step {loop.best.step}' if loop.best else 'the start'
      loop.stop(f'{self.num_worse} evaluations were no better than {best}')

  def state_dict(self):
    return {'num_worse': self.num_worse}

  def load_state_dict(self, state):
    self.num_worse = state['num_worse']
