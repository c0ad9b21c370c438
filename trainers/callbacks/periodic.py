"""Periodic actions of CLU as callbacks."""

from concurrent import futures
import logging

from clu import periodic_actions, profiler

from trainers.callbacks.callback import Callback
from trainers.loop import Loop

log = logging.getLogger(__name__)


class PeriodicActionCallback(Callback):
  """Any clu.periodic_actions.PeriodicAction: ReportProgress, Profile, ...

  Raises:
    ValueError: its every_steps is below 1.
  """

  SECONDS = 60  # That an action in the background has to end.

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
    # Of the run, which may be past it: then, of this start.
    first += loop.step if first <= loop.step else 0
    self.action._first_profile = first  # pyright: ignore
    if first >= loop.num_train_steps:
      log.warning('no profile is taken: it would begin at step %d', first)

  def on_train_step_end(self, loop: Loop) -> None:
    self.action(loop.step)

  def on_roll_back(self, loop: Loop) -> None:
    # Called for a step twice, those of CLU raise.
    self.action._previous_step = self.action._last_step = loop.step

  def on_fit_end(self, loop: Loop) -> None:
    # CLU's Profile loses what it is taking when training ends.
    if getattr(self.action, '_session_running', False):
      try:
        profiler.stop()
      except Exception as error:
        log.warning('the profile could not be written: %s', error)
    # An error of the last call in the background would be told at the next.
    for result in getattr(self.action, '_cb_results', ()):
      if isinstance(result, futures.Future):
        result.result(self.SECONDS)
