"""Checkpoints: Orbax, behind a few verbs of our own.

A trainer has a Checkpointer: save, wait, restore, close. Others read.
"""

import logging
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from trainers.errors import UserError
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)


class SaveError(Exception):
  """A checkpoint did not reach the disk."""


class Saved(NamedTuple):
  tree: Any
  meta: dict[str, Any]


def read(
  directory: pathlib.Path, step: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """({name: array}, meta) of a checkpoint, as saved; writes nothing.

  Args:
    directory: with the checkpoints of a run.
    step: a number, 'best' (by the monitored metric) or 'latest'.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  steps = sorted(
    int(path.name) for path in directory.glob('*') if path.name.isdigit()
  )
  if not steps:
    raise UserError(f'{directory}: there is no checkpoint')
  have = ', '.join(map(str, steps))
  number = steps[-1]
  if step == 'best':
    best = _read_item(directory, number, 'meta', ocp.args.JsonRestore())['best']
    number = best[0] if best else None
  elif step != 'latest':
    number = int(step) if step.isdecimal() else None
  if number not in steps:
    raise UserError(
      f'--step={step}: there is no such checkpoint in {directory}; there are '
      f'{have}, best and latest'
    )
  return (
    _read_item(directory, number, 'arrays', ocp.args.StandardRestore()),
    _read_item(directory, number, 'meta', ocp.args.JsonRestore()),
  )


def _read_item(directory, step, name, args):
  handler = {
    'arrays': ocp.StandardCheckpointHandler,
    'meta': ocp.JsonCheckpointHandler,
  }[name]
  try:
    with ocp.Checkpointer(handler()) as checkpointer:
      return checkpointer.restore(
        directory.absolute() / str(step) / name, args=args
      )
  except Exception as error:  # Whatever damage does to a decoder.
    raise UserError(_damage(step, error)) from error


def _damage(step: int, error: Exception) -> str:
  reason = str(error).splitlines()[0] if str(error) else repr(error)
  return f'checkpoint {step} is damaged: {reason}'


def select(arrays: dict[str, Any], prefix: str, like: Any) -> Any:
  """The part of `arrays` under `prefix`, as a tree `like` another.

  Raises:
    UserError: naming the arrays that are missing or of another shape.
  """
  wanted = _by_name(like)
  start = f'{prefix}.'
  found = {
    name.removeprefix(start): x
    for name, x in arrays.items()
    if name.startswith(start)
  }
  _check_leaves(_leaves(found), _leaves(wanted))
  return jax.tree.unflatten(
    jax.tree.structure(like), [found[name] for name in wanted]
  )


def check_fingerprint(saved: str, now: str) -> None:
  """Raises UserError if the checkpoint is of a run on other data."""
  if saved != now:
    raise UserError(
      'the data is not what this run was trained on: its fingerprint was '
      f'{saved}, now it is {now}'
    )


class Checkpointer:
  """<directory>/<step>/: arrays by name, and JSON.

  Args:
    directory: absolute; made if missing.
    keep_latest: how many of the newest are kept, beside the best.
  """

  def __init__(self, directory: pathlib.Path, keep_latest: int = 2):
    self._directory = directory
    self._superseded = directory.with_name('superseded_checkpoints')
    self._manifest = directory.with_name('checkpoints.json')
    self._policy = _LatestAndBest(keep_latest)
    self._saving: int | None = None
    self.newest: int | None = None  # Saved, or restored, by this object.
    try:
      directory.mkdir(parents=True, exist_ok=True)
      self._recover()
      self._manager = self._open()
    except OSError as error:
      raise UserError(f'{directory}: {error.strerror}') from error

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        cleanup_tmp_directories=True,
        # Otherwise a save that fails leaves threads that wait for 20 minutes
        # for a directory, and the process with them.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        step_name_format=ocp.path.step.standard_name_format(),
      ),
    )

  def _recover(self) -> None:
    """Puts back what was superseded by a save that never landed."""
    for old in self._superseded.glob('*'):
      if not (self._directory / old.name).exists():
        old.rename(self._directory / old.name)
    shutil.rmtree(self._superseded, ignore_errors=True)

  def save(
    self, step: int, tree: Any, meta: dict[str, Any], best: int | None
  ) -> None:
    """Copies, and writes in the background. Replaces a checkpoint of `step`.

    `best` is the step that must be kept, whatever its age.

    Raises:
      SaveError: the one before did not reach the disk, or this cannot start.
    """
    self.wait()
    self._policy.best = best
    arrays = _by_name(tree)
    meta = {'leaves': _leaves(arrays), **meta}
    try:
      if step in self._manager.all_steps():
        # Kept until the new one is on the disk.
        self._superseded.mkdir(exist_ok=True)
        path = self._directory / str(step)
        path.rename(self._superseded / str(step))
        self._manager.reload()
      self._manager.save(
        step,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),  # pyright: ignore
          meta=ocp.args.JsonSave(meta),  # pyright: ignore
        ),
        force=True,
      )
    except Exception as error:  # Orbax raises what its storage raises.
      raise SaveError(f'step {step}: {error}') from error
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
        steps = sorted(self._manager.all_steps())
        write_atomically(self._manifest, to_json({'steps': steps}) + '\n')
        shutil.rmtree(self._superseded, ignore_errors=True)
    except Exception as error:  # Orbax raises what its storage raises.
      self.newest = None
      raise SaveError(f'step {step}: {error}') from error
    return step

  def restore(self, abstract: Any) -> Saved | None:
    """The newest intact checkpoint, or None if there never was one.

    Args:
      abstract: a tree of shapes and types, as the saved one must be.

    Raises:
      UserError: it is of another architecture, none is intact, or those that
        were saved are gone.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    failures = []
    for step in steps:
      try:
        saved = self._restore(step, abstract)
      except UserError:
        raise
      except Exception as error:  # Whatever damage does to a decoder.
        failures.append(_damage(step, error))
        continue
      for failure in failures:
        log.warning('%s; using %d', failure, step)
      self._set_aside([s for s in steps if s > step])
      self.newest = step
      return saved
    if failures:
      hint = 'to start anew, choose another --workdir'
      failures.append(f'none in {self._directory} is intact; {hint}')
      raise UserError(failures)
    if self._manifest.exists():
      raise UserError(
        f'{self._directory}: checkpoints were saved here, and all are gone; to '
        'start anew, choose another --workdir'
      )
    return None

  def _set_aside(self, steps: list[int]) -> None:
    """Moves what is damaged out of the way: else it counts as the newest."""
    for step in steps:
      aside = self._directory.with_name('damaged_checkpoints') / str(step)
      shutil.rmtree(aside, ignore_errors=True)
      aside.parent.mkdir(exist_ok=True)
      (self._directory / str(step)).rename(aside)
      log.info('checkpoint %d was moved to %s', step, aside)
    if steps:
      self._manager.reload()

  def _restore(self, step: int, abstract: Any) -> Saved:
    meta = self._manager.restore(
      step,
      args=ocp.args.Composite(meta=ocp.args.JsonRestore()),  # pyright: ignore
    )['meta']
    wanted = _by_name(abstract)
    _check_leaves(meta['leaves'], _leaves(wanted))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      for name, x in wanted.items()
    }
    arrays = self._manager.restore(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardRestore(wanted)  # pyright: ignore
      ),
    )['arrays']
    tree = jax.tree.unflatten(
      jax.tree.structure(abstract), [arrays[name] for name in wanted]
    )
    return Saved(tree, meta)

  def close(self) -> None:
    self._manager.close()


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
  """Keeps the newest few, and the best as the trainer knows it.

  Not by scores stored with Orbax: it reads them all when it starts, and a
  damaged one keeps it from starting.
  """

  def __init__(self, num_latest: int):
    self.num_latest = num_latest
    self.best: int | None = None

  def should_preserve(self, checkpoints, *, context):
    del context
    newest = sorted(c.step for c in checkpoints)[-self.num_latest :]
    return [c.step in newest or c.step == self.best for c in checkpoints]


def _by_name(tree: Any) -> dict[str, Any]:
  """{'state.params.block_0...': leaf}: no container types on the disk."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def _leaves(arrays: dict[str, Any]) -> dict[str, str]:
  return {name: f'{x.dtype.name}{list(x.shape)}' for name, x in arrays.items()}


def _check_leaves(saved: dict[str, str], wanted: dict[str, str]) -> None:
  if saved == wanted:
    return
  names = [n for n in saved | wanted if saved.get(n) != wanted.get(n)]
  lines = [
    f'{name} is {saved.get(name, "missing")} in the checkpoint, '
    f'{wanted.get(name, "missing")} in this model'
    for name in names[:5]
  ]
  if len(names) > 5:
    lines.append(f'... and {len(names) - 5} more')
  raise UserError(['the checkpoint is of another architecture:', *lines])
