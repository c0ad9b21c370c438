"""Saving, restoring and rolling back a run."""

from collections.abc import Callable, Collection
import logging
from typing import Any

import jax

from trainers.checkpoint import Checkpointer, SaveError, compatibility
from trainers.checkpoint.reader import Saved
from trainers.errors import UserError
from trainers.runtime.clock import Clock
from trainers.state import TrainState

log = logging.getLogger(__name__)

# A last save that fails is tried once more: the disk may have room by then.
LAST_SAVE_ATTEMPTS = 2


class Recovery:
  """Checkpoints of a run: which are saved, and which one it returns to.

  Args:
    checkpointer: Writes and reads checkpoints. None keeps none.
    identity: Facts that a checkpoint must share with this run, by name.
    allow_changed: Names in `identity` whose facts may differ.
    clock: Clock of the run, for the phase 'checkpoint'.
    on_saved: Called with a step once its checkpoint is on the disk.
  """

  def __init__(
    self,
    checkpointer: Checkpointer | None,
    identity: dict[str, Any],
    allow_changed: Collection[str],
    clock: Clock,
    on_saved: Callable[[int], None],
  ):
    self._checkpointer = checkpointer
    self._identity = identity
    self._allow_changed = allow_changed
    self._clock = clock
    self._on_saved = on_saved

  def restore(self, shapes: Any) -> Saved | None:
    """Returns the newest intact checkpoint, or None if there never was one.

    Args:
      shapes: Tree of shapes and dtypes that the checkpoint must have.

    Raises:
      UserError: The checkpoint is of another run, or none is intact.
    """
    saved = self._checkpointer and self._checkpointer.restore(shapes)
    if not saved:
      return None
    compatibility.check(
      saved.meta['identity'], self._identity, self._allow_changed
    )
    return saved

  def has_same_data(self, saved: Saved) -> bool:
    """Returns whether scores in `saved` are of the data of this run."""
    return saved.meta['identity']['data'] == self._identity['data']

  def save(
    self,
    step: int,
    tree: dict[str, Any],
    meta: dict[str, Any],
    best: int | None,
    *,
    is_paused: bool,
  ) -> None:
    """Saves a step asynchronously.

    Args:
      step: Step of the checkpoint.
      tree: Arrays; `tree['state']` is the TrainState.
      meta: JSON values.
      best: Step of the best checkpoint, which is kept.
      is_paused: Whether a signal caused the save.

    Raises:
      SaveError: The save cannot start.
      ValueError: This run keeps no checkpoints.
    """
    if not self._checkpointer:
      raise ValueError('this trainer was given no checkpointer')
    jax.block_until_ready(tree['state'])
    meta = {'identity': self._identity, **meta}
    standing = _standing(tree['state'], is_paused)
    with self._clock.phase('checkpoint'):
      self._checkpointer.save(step, tree, meta, best=best, standing=standing)

  def wait_for_save(self) -> SaveError | None:
    """Waits for the previous save; reports that it is on the disk, or why not.

    Returns:
      The error of the previous save, which is logged, or None.
    """
    if not self._checkpointer:
      return None
    try:
      with self._clock.phase('checkpoint'):
        step = self._checkpointer.wait()
    except SaveError as error:
      self._log(error)
      return error
    if step is not None:
      self._on_saved(step)
    return None

  def newest_good(self, shapes: Any) -> Saved | None:
    """Returns the newest good checkpoint; those saved after it are set aside.

    Returns:
      None if no good checkpoint is left. The reason is logged.
    """
    self.wait_for_save()
    try:
      if self._checkpointer and self._checkpointer.undo():
        return self.restore(shapes)
    except UserError as error:
      log.error('%s', error)
    return None

  def save_last(
    self, step: int, save: Callable[[], None], *, diverged: bool
  ) -> SaveError | None:
    """Ensures that the last step is on the disk, unless the run diverged.

    Args:
      step: Last step of the run.
      save: Starts a save of `step`; may raise SaveError.
      diverged: Whether the run diverged: its last checkpoints are set aside.

    Returns:
      The last error if the step could not be saved, or None.
    """
    if not self._checkpointer:
      return None
    error = self.wait_for_save()
    if diverged:
      self._checkpointer.undo()
      return None
    for _ in range(LAST_SAVE_ATTEMPTS):
      if self._checkpointer.newest == step:
        return None
      try:
        save()
        error = self.wait_for_save()
      except SaveError as raised:
        self._log(raised)
        error = raised
    return None if self._checkpointer.newest == step else error

  def _log(self, error: SaveError) -> None:
    if self._checkpointer and self._checkpointer.is_first:
      log.error('a checkpoint could not be saved: %s', error)

  def close(self, seconds: float | None = None) -> None:
    """Closes the checkpointer.

    Args:
      seconds: Bound of the wait for the last save; None for none.
    """
    if self._checkpointer:
      self._checkpointer.close(seconds)


def _standing(state: TrainState, is_paused: bool) -> str:
  """Returns 'good', 'paused' or 'refused', as of `Checkpointer.save`."""
  if int(state.skipped_in_a_row):
    return 'refused'
  # A run never returns to a checkpoint that a signal caused: the moment of a
  # signal would otherwise change its end.
  return 'paused' if is_paused else 'good'
