"""A plug-in callback that raises on one process of a run."""

import dataclasses

import jax

from trainers.callbacks import Callback


@dataclasses.dataclass
class Raises(Callback):
  """Callback that raises at the end of a step.

  Args:
    process: Index of the process.
    step: Step.
  """

  process: int = 0
  step: int = 5

  def on_train_step_end(self, loop):
    if loop.step == self.step and jax.process_index() == self.process:
      raise ZeroDivisionError('in the plug-in')
