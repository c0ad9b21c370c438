"""Early stopping."""

from trainers.callbacks.callback import Callback


class EarlyStopping(Callback):
  """Stops after `patience` evaluations without a new best; 0: never."""

  def __init__(self, patience: int):
    self.patience = patience
    self.num_worse = 0

  def on_eval_end(self, loop, split, metrics):
    if loop.score is None or loop.score.step != loop.step:
      return  # An evaluation that is not monitored.
    self.num_worse = 0 if loop.best == loop.score else self.num_worse + 1
    if self.patience and self.num_worse >= self.patience:
      loop.stop(
        f'no better than step {loop.best.step} for {self.num_worse} evaluations'
        if loop.best
        else 'no finite evaluation'
      )

  def state_dict(self):
    return {'num_worse': self.num_worse}

  def load_state_dict(self, state):
    self.num_worse = state['num_worse']
