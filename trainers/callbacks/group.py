"""The callbacks of a run, in the order of their calls."""

from collections.abc import Iterable
import logging
from typing import Any

from clu import periodic_actions

from trainers.callbacks.callback import Callback
from trainers.callbacks.periodic import PeriodicActionCallback
from trainers.loop import Loop

log = logging.getLogger(__name__)


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

  def emit(self, hook: str, *args: Any) -> None:
    for callback in self:
      getattr(callback, hook)(*args)

  def on_exception(self, loop: Loop, error: BaseException) -> None:
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
