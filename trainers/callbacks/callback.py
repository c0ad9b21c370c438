"""Base class of callbacks, with the hooks of a run."""

from typing import Any, ClassVar

from trainers.loop import Loop


class Callback:
  """Hooks that the trainer calls. All are optional.

  Callbacks are called in the order in which they are listed.

  Attributes:
    state_name: Name of this very class in checkpoints; '' uses the class name.
      A class that is renamed sets its old name. Subclasses do not inherit it.
  """

  state_name: ClassVar[str] = ''

  def on_fit_start(self, loop: Loop) -> None:
    """Runs when parameters exist or are restored, before the first step."""

  def on_train_step_end(self, loop: Loop) -> None:
    """Runs exactly once per step, also across a kill and a resume.

    Steps that a rollback undid run their hooks again.
    """

  def on_log(self, loop: Loop, metrics: dict[str, Any]) -> None:
    """Receives the means since the previous log; additions are written.

    `loop.state` may already be one step ahead.
    """

  def on_eval_end(
    self, loop: Loop, split: str, metrics: dict[str, Any]
  ) -> None:
    """Receives the metrics of a pass over `split`; additions are written."""

  def on_checkpoint(self, loop: Loop, step: int) -> None:
    """Runs when the checkpoint of `step` is on the disk.

    This is known before the next save, or at the end.
    """

  def on_roll_back(self, loop: Loop) -> None:
    """Runs when `loop` and the callbacks are restored to an earlier step."""

  def on_exception(self, loop: Loop, error: BaseException) -> None:
    """Runs when training failed with `error`, which `fit` will raise."""

  def on_fit_end(self, loop: Loop) -> None:
    """Runs at the end, also after an error. See `loop.status`."""

  def state_dict(self) -> dict[str, Any]:
    """Returns the state of this callback as JSON values.

    Each checkpoint holds it. An empty dict means no state.
    """
    return {}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    """Restores what `state_dict` returned when the checkpoint was saved."""
