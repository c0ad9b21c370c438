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
  """List of callbacks in the order of their calls.

  Args:
    callbacks: Callbacks and periodic actions of CLU, which are wrapped.
  """

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
    """Calls a hook of every callback."""
    for callback in self:
      getattr(callback, hook)(*args)

  def on_exception(self, loop: Loop, error: BaseException) -> None:
    """Calls `on_exception` of every callback; logs what they raise.

    Args:
      loop: Run that failed.
      error: Error that ended the run.
    """
    for callback in self:
      try:
        callback.on_exception(loop, error)
      except BaseException as other:  # SystemExit must not hide `error` either.
        log.error(
          'on_exception of %s raised %r', type(callback).__name__, other
        )

  def state_dict(self) -> dict[str, Any]:
    """Returns the states of callbacks by name, without the empty ones."""
    states = {
      name: callback.state_dict()
      for name, callback in zip(self.names, self, strict=True)
    }
    return {name: state for name, state in states.items() if state}

  def load_state_dict(self, states: dict[str, Any]) -> None:
    """Restores the states of callbacks by name; others keep theirs."""
    for name, callback in zip(self.names, self, strict=True):
      if name in states:
        callback.load_state_dict(states[name])
