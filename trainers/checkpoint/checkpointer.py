"""Writer of a run's checkpoints, built on Orbax.

A trainer has a Checkpointer, with save, wait, restore, undo and close.
"""

import contextlib
import json
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import reader
from trainers.checkpoint.reader import Layout, Saved
from trainers.errors import UserError, first_line
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)


class SaveError(Exception):
  """Error: a checkpoint could not be written to the disk."""


class Checkpointer:
  """Writer and reader of a run's checkpoints.

  A checkpoint is a directory <directory>/<step>/ of arrays by name and JSON
  values. The parent of `directory` has checkpoints.json, which lists the saved
  steps. It also has damaged_checkpoints and undone_checkpoints, for checkpoints
  that were set aside.

  Args:
    directory: Absolute path, created if missing.
    keep_latest: Number of newest checkpoints to keep, besides the best and the
      newest good one.
    layout: Layout of the arrays.

  Attributes:
    newest: Newest step that this object saved or restored, or None.

  Raises:
    UserError: The directory cannot be created, or its path has *, ? or [.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    keep_latest: int = 2,
    layout: Layout | None = None,
  ):
    self._directory = directory
    self._layout = layout or Layout()
    self._superseded = reader.superseded(directory)
    self._manifest = directory.with_name('checkpoints.json')
    self._policy = _Policy(keep_latest)
    self._kept = self._policy.kept  # Value after the last completed save.
    self._saving: int | None = None
    self.newest: int | None = None
    if wildcards := set(str(directory)) & set('*?['):
      # Orbax finds its files by glob patterns: it could not read a checkpoint
      # below such a path.
      raise UserError(
        f'{directory}: the path of checkpoints has the wildcard '
        f'{" and ".join(sorted(wildcards))}; choose a --workdir without *, ? '
        'and ['
      )
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._restore_superseded()
      self._manager = self._open()
    except OSError as error:
      raise UserError(f'{directory}: {error.strerror}') from error

  def _open(self) -> ocp.CheckpointManager:
    self._delete_unfinished()
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        # Asynchronous creation would leave threads, after a failed save, that
        # wait 20 minutes for a directory and delay the end of the process.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        step_name_format=ocp.path.step.standard_name_format(),
      ),
    )

  def _delete_unfinished(self) -> None:
    """Deletes the directories of unfinished saves.

    Orbax deletes them only when a manager is created. Its writers may outlive a
    failed save and create their directory again.
    """
    for unfinished in self._directory.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*'):
      shutil.rmtree(unfinished, ignore_errors=True)

  def _restore_superseded(self) -> None:
    """Moves back the checkpoints that an unfinished save superseded."""
    for old in self._superseded.glob('*'):
      if not (self._directory / old.name).exists():
        old.rename(self._directory / old.name)
    shutil.rmtree(self._superseded, ignore_errors=True)

  def save(
    self,
    step: int,
    tree: Any,
    meta: dict[str, Any],
    best: int | None,
    standing: str = 'good',
  ) -> None:
    """Copies a state and writes it in the background.

    An existing checkpoint of `step` is replaced. The best checkpoint and the
    newest good one are kept at any age.

    Args:
      step: Step of the state.
      tree: Tree of arrays.
      meta: JSON values.
      best: Step of the best checkpoint, or None.
      standing: 'good' if a rollback may return to the checkpoint; 'paused' if
        a signal caused the save; 'refused' if its last update was refused.

    Raises:
      SaveError: The previous save failed, or this save cannot start.
    """
    self.wait()
    self._delete_unfinished()
    try:
      arrays = arrays_lib.flatten_by_name(tree)
      meta = {
        'step': step,
        'layout': self._layout.version,
        'leaves': arrays_lib.signatures(arrays),
        'content': arrays_lib.fingerprints(arrays),
        'standing': standing,
        **meta,
      }
      # JSON changes tuples and keys: the digest is of the values read back.
      meta = json.loads(json.dumps(meta))
      meta['digest'] = reader.digest(meta)
      if step in self._manager.all_steps():
        # The old checkpoint is kept until the new one is on the disk.
        self._superseded.mkdir(exist_ok=True)
        path = self._directory / str(step)
        path.rename(self._superseded / str(step))
        self._manager.reload()
      existing = {step, *self._manager.all_steps()}
      best = best if best in existing else self._kept.best
      self._policy.kept = (
        _Kept(best, step, best)
        if standing == 'good'
        else self._kept._replace(best=best)
      )
      self._manager.save(
        step,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),  # pyright: ignore
          meta=ocp.args.JsonSave(meta),  # pyright: ignore
        ),
        force=True,
      )
    except Exception as error:  # Storage backends of Orbax may raise anything.
      self._reset()
      raise SaveError(f'step {step}: {first_line(error)}') from error
    self.newest = self._saving = step

  def wait(self) -> int | None:
    """Waits until the last save is on the disk.

    Returns:
      The step of the save; None if an earlier call returned it.

    Raises:
      SaveError: The save failed.
    """
    step, self._saving = self._saving, None
    try:
      self._manager.wait_until_finished()
      if step is not None:
        self._write_manifest()
        shutil.rmtree(self._superseded, ignore_errors=True)
        self._kept = self._policy.kept
    except Exception as error:  # Storage backends of Orbax may raise anything.
      self._reset()
      raise SaveError(f'step {step}: {first_line(error)}') from error
    return step

  def _reset(self) -> None:
    """Restores the directory and the manager as before a failed save."""
    self.newest = None
    self._policy.kept = self._kept
    # The manager skips waiting for the arrays if its own file failed.
    with contextlib.suppress(Exception):
      self._manager._checkpointer.wait_until_finished()  # pyright: ignore
    try:
      self._restore_superseded()
      # The manager of the failed save counts an unsaved step, has lost its
      # pending deletions, and would raise the same error at the next call.
      self._manager = self._open()
    except OSError as error:
      log.error('%s: %s', self._directory, error)

  def restore(self, abstract: Any) -> Saved | None:
    """Returns the newest intact checkpoint, or None if there never was one.

    Newer, damaged checkpoints are set aside: they would count as the newest.

    Args:
      abstract: Tree of shapes, dtypes and shardings that the checkpoint must
        have. Its arrays may have been saved with other shardings.

    Raises:
      UserError: The checkpoints are of another architecture, none is intact,
        or those that were saved are missing.
    """
    steps = reader.steps_in(self._directory)
    failures = {
      step: f'checkpoint {step} is missing'
      for step in self._recorded(steps)
      if step not in steps
    }
    mismatch = None
    for step in reversed(steps):
      try:
        found = self._restore(step, abstract)
      except UserError as error:
        mismatch = mismatch or error
        failures[step] = (
          f'checkpoint {step} is of another model: {error.problems[1]}'
        )
      except Exception as error:  # Decoders of damaged data raise anything.
        failures[step] = reader.damage(step, error)
      else:
        for newer in sorted(s for s in failures if s > step):
          log.warning('%s; using %d', failures[newer], step)
        self._set_aside([s for s in steps if s > step], 'damaged')
        self.newest = step
        good = (
          (s, meta)
          for s in reversed(steps)
          if s <= step and (meta := self._meta(s))['standing'] == 'good'
        )
        good, meta = next(good, (None, {}))
        best = meta.get('best')
        self._kept = _Kept(good=good, best_then=best and best[0])
        return found
    if mismatch:
      raise mismatch
    remedy = 'choose another --workdir to start a new run'
    if steps:
      summary = f'{self._directory}: no checkpoint is intact; {remedy}'
      raise UserError([*(failures[s] for s in sorted(failures)), summary])
    if failures:
      raise UserError(
        f'{self._directory}: all checkpoints of the run are missing; {remedy}'
      )
    return None

  def _restore(self, step: int, abstract: Any) -> Saved:
    wanted = arrays_lib.flatten_by_name(abstract)
    meta = reader.read_meta(self._directory, step)
    arrays_lib.check_signatures(meta['leaves'], arrays_lib.signatures(wanted))
    is_older = self._layout.needs_upgrade(meta)
    arrays = reader.read_arrays(self._directory, step, meta, wanted)
    if is_older:
      shardings = {name: x.sharding for name, x in wanted.items()}
      arrays = jax.jit(self._layout.upgrade, out_shardings=shardings)(arrays)
    structure = jax.tree.structure(abstract)
    return Saved(
      jax.tree.unflatten(structure, [arrays[name] for name in wanted]), meta
    )

  def _meta(self, step: int) -> dict[str, Any]:
    try:
      return {'standing': 'good', **reader.read_meta(self._directory, step)}
    except Exception:  # A decoder of damaged data may raise anything.
      return {'standing': 'damaged'}

  def undo(self) -> bool:
    """Sets aside the checkpoints after the newest good one.

    Without a good one, checkpoints whose last update was refused are set aside.

    Returns:
      Whether there is a good checkpoint.
    """
    steps, good = reader.steps_in(self._directory), self._kept.good
    if good is None:
      bad = [s for s in steps if self._meta(s)['standing'] == 'refused']
    else:
      bad = [s for s in steps if s > good]
    self._set_aside(bad, 'undone')
    return good is not None

  def _set_aside(self, steps: list[int], reason: str) -> None:
    for step in steps:
      target = self._directory.with_name(f'{reason}_checkpoints') / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(target)
      log.info('checkpoint %d was moved to %s', step, target)
    if steps:
      self._manager.reload()
      self._write_manifest()

  def _write_manifest(self) -> None:
    text = to_json({'steps': reader.steps_in(self._directory)})
    write_atomically(self._manifest, text + '\n')

  def _recorded(self, steps: list[int]) -> list[int]:
    """Returns the steps in the manifest, or `steps` if it is damaged.

    Args:
      steps: Steps of the existing checkpoints.

    Raises:
      UserError: The manifest is damaged, and no checkpoint exists.
    """
    try:
      return list(map(int, json.loads(self._manifest.read_text())['steps']))
    except FileNotFoundError:
      return steps
    except (OSError, ValueError, KeyError, TypeError) as error:
      problem = f'{self._manifest} is damaged: {error!r}'
      if not steps:
        raise UserError(f'{problem}; there is no checkpoint') from error
      log.warning('%s', problem)
      return steps

  def close(self) -> None:
    """Closes the manager. A save that fails meanwhile is logged."""
    try:
      self._manager.close()
    except Exception as error:  # Storage backends of Orbax may raise anything.
      if self._saving is not None:
        log.error('step %d could not be saved: %s', self._saving, error)


class _Kept(NamedTuple):
  """Steps of checkpoints that are kept at any age.

  Attributes:
    best: Best step, as the trainer reports it.
    good: Newest step that a rollback may return to.
    best_then: Best step when `good` was saved. A rollback makes it the best
      again.
  """

  best: int | None = None
  good: int | None = None
  best_then: int | None = None


class _Policy(checkpoint_managers.PreservationPolicy):
  """Policy that keeps the newest checkpoints, the best and the newest good one.

  Scores that Orbax stores are not used: it reads all of them when a manager is
  created, and fails on a damaged one.
  """

  def __init__(self, num_latest: int):
    self.num_latest = num_latest
    self.kept = _Kept()

  def should_preserve(self, checkpoints, *, context):
    del context
    newest = sorted(c.step for c in checkpoints)[-self.num_latest :]
    return [c.step in newest or c.step in self.kept for c in checkpoints]
