"""The hooks, all optional, and CLU's periodic actions as one of them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent import futures
import logging
from typing import TYPE_CHECKING, Any, ClassVar

from clu import periodic_actions, profiler

if TYPE_CHECKING:
  from trainers.trainer import Trainer

log = logging.getLogger(__name__)


class Callback:
  """Called by the trainer, in the order in which callbacks are listed.

  Attributes:
    state_name: Name under which checkpoints refer to callbacks of this very
      class; '' uses the class name. A class that is renamed sets it to its old
      name. Subclasses do not inherit it.
  """

  state_name: ClassVar[str] = ''

  def on_fit_start(self, loop: Trainer) -> None:
    """Parameters exist, or are restored; no step has run."""

  def on_train_step_end(self, loop: Trainer) -> None:
    """Once per step, exactly, also across a kill and a resume.

    Steps that a rollback undid are done again.
    """

  def on_log(self, loop: Trainer, metrics: dict[str, Any]) -> None:
    """Means since the last log. What is added here is written too.

    `loop.state` may already be one step further on.
    """

  def on_eval_end(
    self, loop: Trainer, split: str, metrics: dict[str, Any]
  ) -> None:
    """After a pass over `split`. What is added here is written too."""

  def on_checkpoint(self, loop: Trainer, step: int) -> None:
    """The checkpoint of `step` is on the disk: told before the next save."""

  def on_roll_back(self, loop: Trainer) -> None:
    """`loop` is back at an earlier step, with what was remembered there."""

  def on_exception(self, loop: Trainer, error: BaseException) -> None:
    """Training failed with `error`, which the caller of fit() will see."""

  def on_fit_end(self, loop: Trainer) -> None:
    """Always called, whatever happened: loop.status tells."""

  def state_dict(self) -> dict[str, Any]:
    """JSON values, saved with each checkpoint; {}: nothing to remember."""
    return {}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    """What `state_dict` returned when the checkpoint was saved."""


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

  def on_fit_start(self, loop: Trainer) -> None:
    first = getattr(self.action, '_first_profile', None)
    if first is None:
      return
    # Of the run, which may be past it: then, of this start.
    first += loop.step if first <= loop.step else 0
    self.action._first_profile = first  # pyright: ignore
    if first >= loop.num_train_steps:
      log.warning('no profile is taken: it would begin at step %d', first)

  def on_train_step_end(self, loop: Trainer) -> None:
    self.action(loop.step)

  def on_roll_back(self, loop: Trainer) -> None:
    # Called for a step twice, those of CLU raise.
    self.action._previous_step = self.action._last_step = loop.step

  def on_fit_end(self, loop: Trainer) -> None:
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


class Callbacks(list[Callback]):
  """In the order of their calls; CLU's periodic actions among them."""

  def __init__(
    self, callbacks: Iterable[Callback | periodic_actions.PeriodicAction]
  ):
    super().__init__(
      PeriodicActionCallback(c)
      if isinstance(c, periodic_actions.PeriodicAction)
      else c
      for c in callbacks
    )

  @property
  def names(self) -> list[str]:
    """The names in checkpoints, numbered where one occurs again."""
    names: list[str] = []
    for callback in self:
      kind = type(callback)
      name = vars(kind).get('state_name') or kind.__name__
      number = 1 + sum(n.partition(':')[0] == name for n in names)
      names.append(f'{name}:{number}' if number > 1 else name)
    return names

  def each(self, hook: str, *args: Any) -> None:
    for callback in self:
      getattr(callback, hook)(*args)

  def on_exception(self, loop: Trainer, error: BaseException) -> None:
    """Tells every one; what they raise does not hide `error`."""
    for callback in self:
      try:
        callback.on_exception(loop, error)
      except BaseException as other:  # Of SystemExit too.
        log.error('in on_exception of %s: %r', type(callback).__name__, other)

  def state_dict(self) -> dict[str, Any]:
    """By name, of those that have something to remember."""
    states = {
      name: callback.state_dict()
      for name, callback in zip(self.names, self, strict=True)
    }
    return {name: state for name, state in states.items() if state}

  def load_state_dict(self, states: dict[str, Any]) -> None:
    for name, callback in zip(self.names, self, strict=True):
      if name in states:
        callback.load_state_dict(states[name])
