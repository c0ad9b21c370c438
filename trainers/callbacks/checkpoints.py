"""Periodic checkpoints."""

import logging

from trainers.callbacks.callback import Callback
from trainers.checkpoint.checkpointer import SaveError

log = logging.getLogger(__name__)


class Checkpoints(Callback):
  """Callback that saves periodically and after the last step.

  A checkpoint includes the evaluation of its step if Evaluation is listed
  before. A save that fails is logged; the next period tries again.

  Args:
    every_steps: Steps between two saves.
  """

  def __init__(self, every_steps: int):
    self.every_steps = every_steps

  def on_train_step_end(self, loop):
    due = loop.step % self.every_steps == 0 or loop.step == loop.num_train_steps
    if due and loop.status != 'diverged':
      try:
        loop.checkpoint()
      except SaveError as error:
        if loop.is_first:  # Saves fail on all processes.
          log.warning('a checkpoint could not be saved: %s', error)
