"""Periodic actions of CLU as callbacks."""

from concurrent import futures
import logging

from clu import periodic_actions, profiler

from trainers.callbacks.callback import Callback
from trainers.loop import Loop

log = logging.getLogger(__name__)


class PeriodicActionCallback(Callback):
  """Callback that calls a periodic action of CLU after each step.

  Args:
    action: Any clu.periodic_actions.PeriodicAction, for example ReportProgress.

  Raises:
    ValueError: `every_steps` of the action is below 1.
  """

  SECONDS = 60  # Time limit of a background action at the end of the run.

  def __init__(self, action: periodic_actions.PeriodicAction):
    every_steps = action._every_steps
    if every_steps is not None and every_steps < 1:
      raise ValueError(
        f'{type(action).__name__}: {every_steps=} must be >= 1 or None'
      )
    self.action = action

  def on_fit_start(self, loop: Loop) -> None:
    first = getattr(self.action, '_first_profile', None)
    if first is None:
      return
    # A resumed run may be past the first step of the profile: the profile then
    # begins as many steps after this start.
    first += loop.step if first <= loop.step else 0
    self.action._first_profile = first  # pyright: ignore
    if first >= loop.num_train_steps:
      log.warning('no profile is taken: it would begin at step %d', first)

  def on_train_step_end(self, loop: Loop) -> None:
    self.action(loop.step)

  def on_roll_back(self, loop: Loop) -> None:
    # CLU's actions raise if they are called for a step twice.
    self.action._previous_step = self.action._last_step = loop.step

  def on_fit_end(self, loop: Loop) -> None:
    # CLU's Profile would lose a profile that is running when training ends.
    if getattr(self.action, '_session_running', False):
      try:
        profiler.stop()
      except Exception as error:
        log.warning('the profile could not be written: %s', error)
    # CLU reports an error of a background call at the next call only.
    for result in getattr(self.action, '_cb_results', ()):
      if isinstance(result, futures.Future):
        result.result(self.SECONDS)
