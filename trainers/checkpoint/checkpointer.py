"""Writer of a run's checkpoints, built on Orbax.

A trainer has a Checkpointer, with save, wait, restore, undo and close.
"""

import functools
import json
import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax

from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import reader, saver
from trainers.checkpoint.reader import Layout, Saved
from trainers.checkpoint.saver import Saver
from trainers.errors import PeerError, UserError, first_line
from trainers.files import to_json, write_atomically
from trainers.runtime import processes

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
    self._keep_latest = keep_latest
    self._group = processes.group('checkpoint')
    self._kept = _Kept()  # Value after the last completed save.
    self._next_kept = self._kept
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
    self._saver = Saver(directory, self._write_manifest)
    try:
      self._group.first(self._open)
    except OSError as error:
      raise UserError(f'{directory}: {error.strerror}') from error

  @property
  def is_first(self) -> bool:
    """True on the process that reports a failed save for all."""
    return self._group.is_first

  def _open(self) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    self._restore_superseded()
    saver.delete_unfinished(self._directory)

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
      self._next_kept = kept = self._kept_after(step, best, standing)
      self._saver.start(
        step,
        arrays,
        meta,
        prepare=lambda: self._make_room(step),
        obsolete=lambda: self._obsolete(kept),
      )
    except Exception as error:  # Storage backends of Orbax may raise anything.
      self._reset()
      raise SaveError(f'step {step}: {first_line(error)}') from error
    self.newest = self._saving = step

  def _kept_after(self, step: int, best: int | None, standing: str) -> '_Kept':
    existing = {step, *reader.steps_in(self._directory)}
    best = best if best in existing else self._kept.best
    if standing == 'good':
      return _Kept(best, step, best)
    return self._kept._replace(best=best)

  def _make_room(self, step: int) -> None:
    """Moves an old checkpoint of `step` aside, until the new one is saved."""
    saver.delete_unfinished(self._directory)
    if (path := self._directory / str(step)).exists():
      self._superseded.mkdir(exist_ok=True)
      path.rename(self._superseded / str(step))

  def _obsolete(self, kept: '_Kept') -> list[int]:
    """Returns the steps to delete, once the newest checkpoint is saved."""
    shutil.rmtree(self._superseded, ignore_errors=True)
    old = reader.steps_in(self._directory)[: -self._keep_latest]
    return [step for step in old if step not in kept]

  def wait(self) -> int | None:
    """Waits until the last save is on the disk.

    Returns:
      The step of the save; None if an earlier call returned it.

    Raises:
      SaveError: The save failed.
    """
    step, self._saving = self._saving, None
    try:
      self._saver.wait()
    except Exception as error:  # Storage backends of Orbax may raise anything.
      self._reset()
      raise SaveError(f'step {step}: {first_line(error)}') from error
    if step is not None:
      self._kept = self._next_kept
    return step

  def _reset(self) -> None:
    """Restores the directory as before a failed save."""
    self.newest = None
    try:
      self._group.first(self._open)
    except (OSError, PeerError) as error:
      if self.is_first:
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
    steps = self._group.first(lambda: reader.steps_in(self._directory))
    recorded = self._group.first(lambda: self._recorded(steps))
    failures = {
      step: f'checkpoint {step} is missing'
      for step in recorded
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
        kept = functools.partial(self._kept_until, step)
        self._kept = _Kept(*self._group.first(kept))
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

  def _kept_until(self, step: int) -> list[int | None]:
    """Returns the fields of `_Kept` after the save of `step`."""
    for good in reversed(reader.steps_in(self._directory)):
      if good <= step and (meta := self._meta(good))['standing'] == 'good':
        best = meta.get('best')
        return [None, good, best and best[0]]
    return [None, None, None]

  def _restore(self, step: int, abstract: Any) -> Saved:
    wanted = arrays_lib.flatten_by_name(abstract)
    meta, arrays, is_older, error = {}, {}, False, None
    try:
      meta = reader.read_meta(self._directory, step)
      arrays_lib.check_signatures(meta['leaves'], arrays_lib.signatures(wanted))
      is_older = self._layout.needs_upgrade(meta)
      arrays = reader.read_arrays(self._directory, step, meta, wanted)
    except Exception as raised:  # Decoders of damaged data raise anything.
      error = raised
    # Verification needs the parts of all processes.
    self._group.check(error)
    try:
      reader.verify(arrays, meta)
    except ValueError as raised:
      error = raised
    self._group.check(error)
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
    good = self._kept.good
    steps = self._group.first(lambda: self._after(good))
    self._set_aside(steps, 'undone')
    return good is not None

  def _after(self, good: int | None) -> list[int]:
    steps = reader.steps_in(self._directory)
    if good is None:
      return [s for s in steps if self._meta(s)['standing'] == 'refused']
    return [s for s in steps if s > good]

  def _set_aside(self, steps: list[int], reason: str) -> None:
    if steps:
      self._group.first(lambda: self._move(steps, reason))

  def _move(self, steps: list[int], reason: str) -> None:
    for step in steps:
      target = self._directory.with_name(f'{reason}_checkpoints') / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(target)
      log.info('checkpoint %d was moved to %s', step, target)
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

  def close(self, seconds: float | None = None) -> None:
    """Waits for the last save. A failure is logged.

    Args:
      seconds: Bound of the wait; None for none.
    """
    try:
      self._saver.wait(seconds)
    except Exception as error:  # Storage backends of Orbax may raise anything.
      if self.is_first:
        reason = first_line(error)
        log.error('step %s could not be saved: %s', self._saving, reason)


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
