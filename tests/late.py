"""A process that is late at the first step."""

import time

import jax

from trainers.callbacks import Callback


class Late(Callback):
  """Plug-in that lets the last process wait before the first step.

  Args:
    seconds: Length of the wait.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds

  def on_fit_start(self, loop):
    if jax.process_index() == jax.process_count() - 1:
      time.sleep(self._seconds)
