"""Checkpoints, written: Orbax, behind a few verbs of our own.

A trainer has a Checkpointer: save, wait, restore, undo, close.
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
from trainers.checkpoint.reader import Saved
from trainers.errors import UserError
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)


class SaveError(Exception):
  """A checkpoint did not reach the disk."""


class Checkpointer:
  """<directory>/<step>/: arrays by name, and JSON.

  Beside it are checkpoints.json, which names what was saved, and directories
  of what was set aside: damaged_checkpoints, undone_checkpoints.

  Args:
    directory: absolute; made if missing.
    keep_latest: how many of the newest are kept, beside the best and the
      newest good one.
  """

  def __init__(self, directory: pathlib.Path, keep_latest: int = 2):
    self._directory = directory
    self._superseded = reader.superseded(directory)
    self._manifest = directory.with_name('checkpoints.json')
    self._policy = _Policy(keep_latest)
    self._kept = self._policy.kept  # As the last save that landed left it.
    self._saving: int | None = None
    self.newest: int | None = None  # Saved, or restored, by this object.
    if wild := set(str(directory)) & set('*?['):
      # Orbax looks for its files by patterns: what it had saved in such a place
      # could not be read.
      raise UserError(
        f'{directory}: no checkpoint can be kept in a path with '
        f'{" or ".join(sorted(wild))}'
      )
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._put_back()
      self._manager = self._open()
    except OSError as error:
      raise UserError(f'{directory}: {error.strerror}') from error

  def _open(self) -> ocp.CheckpointManager:
    self._sweep()
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        # Otherwise a save that fails leaves threads that wait for 20 minutes
        # for a directory, and the process with them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        step_name_format=ocp.path.step.standard_name_format(),
      ),
    )

  def _sweep(self) -> None:
    """Deletes what was never finished.

    Orbax would when it is opened, in the background, and not again; its
    writers outlive a save that failed, and may make their directory anew.
    """
    for unfinished in self._directory.glob(f'*{ocp.utils.TMP_DIR_SUFFIX}*'):
      shutil.rmtree(unfinished, ignore_errors=True)

  def _put_back(self) -> None:
    """Puts back what was superseded by a save that never landed."""
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
    """Copies, and writes in the background. Replaces a checkpoint of `step`.

    Whatever their age, the step that is `best` is kept, and the newest whose
    `standing` is good: to which a run may go back. Others are 'paused', which a
    signal caused, or 'refused', as their last update was.

    Raises:
      SaveError: the one before did not reach the disk, or this cannot start.
    """
    self.wait()
    self._sweep()
    try:
      arrays = arrays_lib.flatten_by_name(tree)
      meta = {
        'step': step,
        'leaves': arrays_lib.signatures(arrays),
        'content': arrays_lib.fingerprints(arrays),
        'standing': standing,
        **meta,
      }
      meta = json.loads(json.dumps(meta))  # As it will be read.
      meta['digest'] = reader.digest(meta)
      if step in self._manager.all_steps():
        # Kept until the new one is on the disk.
        self._superseded.mkdir(exist_ok=True)
        path = self._directory / str(step)
        path.rename(self._superseded / str(step))
        self._manager.reload()
      there = {step, *self._manager.all_steps()}
      best = best if best in there else self._kept.best
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
    except Exception as error:  # Orbax raises what its storage raises.
      self._give_up()
      raise SaveError(f'step {step}: {reader.told(error)}') from error
    self.newest = self._saving = step

  def wait(self) -> int | None:
    """The step of the last save, once it is on the disk; None the next time.

    Raises:
      SaveError: it is not.
    """
    step, self._saving = self._saving, None
    try:
      self._manager.wait_until_finished()
      if step is not None:
        self._write_manifest()
        shutil.rmtree(self._superseded, ignore_errors=True)
        self._kept = self._policy.kept
    except Exception as error:  # Orbax raises what its storage raises.
      self._give_up()
      raise SaveError(f'step {step}: {reader.told(error)}') from error
    return step

  def _give_up(self) -> None:
    """After a save that failed: what was there is there, and no more."""
    self.newest = None
    self._policy.kept = self._kept
    # It waits for the arrays only if its own record could be written.
    with contextlib.suppress(Exception):
      self._manager._checkpointer.wait_until_finished()  # pyright: ignore
    try:
      self._put_back()
      # The one that failed counts what never landed, forgot what it meant to
      # delete, left a directory where there is no room, and would tell of one
      # failure after another.
      self._manager = self._open()
    except OSError as error:
      log.error('%s: %s', self._directory, error)

  def restore(self, abstract: Any) -> Saved | None:
    """The newest intact checkpoint, or None if there never was one.

    What is newer is set aside: it would count as the newest.

    Args:
      abstract: a tree of shapes and types, as the saved one must be.

    Raises:
      UserError: it is of another architecture, none is intact, or those that
        were saved are gone.
    """
    steps = reader.steps_in(self._directory)
    failures = {
      step: f'checkpoint {step} is gone'
      for step in self._recorded(steps)
      if step not in steps
    }
    mismatch = None
    for step in reversed(steps):
      try:
        found = self._restore(step, abstract)
      except UserError as error:
        mismatch = mismatch or error
        failures[step] = f'checkpoint {step} is foreign: {error.problems[1]}'
      except Exception as error:  # Whatever damage does to a decoder.
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
    anew = 'to start anew, choose another --workdir'
    if steps:
      none = f'none in {self._directory} is intact; {anew}'
      raise UserError([*(failures[s] for s in sorted(failures)), none])
    if failures:
      raise UserError(
        f'{self._directory}: checkpoints were saved here, and all are gone; '
        f'{anew}'
      )
    return None

  def _restore(self, step: int, abstract: Any) -> Saved:
    wanted = arrays_lib.flatten_by_name(abstract)
    meta = reader.read_meta(self._directory, step)
    arrays_lib.check_signatures(meta['leaves'], arrays_lib.signatures(wanted))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      for name, x in wanted.items()
    }
    arrays = reader.read_arrays(self._directory, step, meta, wanted)
    structure = jax.tree.structure(abstract)
    return Saved(
      jax.tree.unflatten(structure, [arrays[name] for name in wanted]), meta
    )

  def _meta(self, step: int) -> dict[str, Any]:
    try:
      return {'standing': 'good', **reader.read_meta(self._directory, step)}
    except Exception:  # Whatever damage does to a decoder.
      return {'standing': 'damaged'}

  def undo(self) -> bool:
    """Whether there is a good one; sets aside what was saved after it.

    Without one, those whose last update was refused are set aside.
    """
    steps, good = reader.steps_in(self._directory), self._kept.good
    if good is None:
      astray = [s for s in steps if self._meta(s)['standing'] == 'refused']
    else:
      astray = [s for s in steps if s > good]
    self._set_aside(astray, 'undone')
    return good is not None

  def _set_aside(self, steps: list[int], why: str) -> None:
    for step in steps:
      aside = self._directory.with_name(f'{why}_checkpoints') / str(step)
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(aside)
      log.info('checkpoint %d was moved to %s', step, aside)
    if steps:
      self._manager.reload()
      self._write_manifest()

  def _write_manifest(self) -> None:
    text = to_json({'steps': reader.steps_in(self._directory)})
    write_atomically(self._manifest, text + '\n')

  def _recorded(self, steps: list[int]) -> list[int]:
    """The steps of the manifest; those that are there if it is damaged.

    Raises:
      UserError: it is damaged, and there are none.
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
    """That a save failed is an error no more: it has been told, or is here."""
    try:
      self._manager.close()
    except Exception as error:  # Orbax raises what its storage raises.
      if self._saving is not None:
        log.error('step %d could not be saved: %s', self._saving, error)


class _Kept(NamedTuple):
  """Steps that are kept, whatever their age.

  Attributes:
    best: as the trainer knows it.
    good: the newest that a run may go back to.
    best_then: the best when `good` was saved, which is the best again then.
  """

  best: int | None = None
  good: int | None = None
  best_then: int | None = None


class _Policy(checkpoint_managers.PreservationPolicy):
  """Keeps the newest few, the best as the trainer knows it, the newest good.

  Not by scores stored with Orbax: it reads them all when it starts, and a
  damaged one keeps it from starting.
  """

  def __init__(self, num_latest: int):
    self.num_latest = num_latest
    self.kept = _Kept()

  def should_preserve(self, checkpoints, *, context):
    del context
    newest = sorted(c.step for c in checkpoints)[-self.num_latest :]
    return [c.step in newest or c.step in self.kept for c in checkpoints]
