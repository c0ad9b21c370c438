"""Periodic checkpoints."""

import logging

from trainers.callbacks.callback import Callback
from trainers.checkpoint.checkpointer import SaveError

log = logging.getLogger(__name__)


class Checkpoints(Callback):
  """Saves every `every_steps` steps and after the last one.

  List it after Evaluation: the checkpoint of a step then holds its evaluation.
  A save that fails is reported, and tried again at the next period.
  """

  def __init__(self, every_steps: int):
    self.every_steps = every_steps

  def on_train_step_end(self, loop):
    due = loop.step % self.every_steps == 0 or loop.step == loop.num_train_steps
    if due and loop.status != 'diverged':
      try:
        loop.checkpoint()
      except SaveError as error:
        log.warning('a checkpoint could not be saved: %s', error)
