"""Checkpoints, read: what is there, and whether it is what was saved."""

from collections.abc import Callable
import hashlib
import json
import logging
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from trainers.checkpoint import arrays as arrays_lib
from trainers.errors import UserError

log = logging.getLogger(__name__)

# How often a reader starts again because a trainer replaced the checkpoint.
_ATTEMPTS = 30
# A failed read waits this long for signs that its checkpoint is being deleted.
# Orbax needs a tenth of a second for the directories, after the files.
_SETTLE_SECONDS = 1.0

# {step: the directory in which the directory of that step is}.
Places = dict[int, pathlib.Path]


class _Replaced(Exception):
  """A process deleted, moved or replaced the checkpoint while it was read."""


_WIDE = ('float64', 'int64', 'uint64', 'complex128')


class Saved(NamedTuple):
  tree: Any
  meta: dict[str, Any]


def read(
  directory: pathlib.Path, step: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """({name: array}, meta) of a checkpoint, as saved; writes nothing.

  The run may be in progress: if its trainer replaces a checkpoint while it is
  read, the reading starts again with the checkpoints that are there then.

  Args:
    directory: with the checkpoints of a run.
    step: a number, 'best' (by the monitored metric) or 'latest': the newest
      that is intact.

  Raises:
    UserError: there is no such checkpoint, or it is damaged, or it was replaced
      while it was read.
  """
  for attempt in range(_ATTEMPTS):
    try:
      return _attempt(directory, step, again=attempt > 0)
    except _Replaced as replaced:
      log.debug('%s; reading again', replaced)
  raise UserError(
    f'--step={step}: the checkpoints in {directory} were replaced while they '
    f'were read, {_ATTEMPTS} times in a row; try again, or let the run keep '
    'more of them with checkpoint.keep_latest'
  )


def _attempt(
  directory: pathlib.Path, step: str, again: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what `read` does; `again` says that it was there before.

  Raises:
    _Replaced: another process changed the checkpoint meanwhile.
    UserError: as `read` does.
  """
  places = _places(directory)
  if not places:
    raise UserError(f'{directory}: there is no checkpoint')
  if step == 'latest':
    return _newest(places, _read)
  number = next((n for n in places if str(n) == step), None)
  if step == 'best':
    meta = _newest(places, read_meta)
    number = meta['best'] and meta['best'][0]
  if number not in places:
    problem = (
      f'the checkpoint was replaced while it was read from {directory}'
      if again and step != 'best'
      else f'there is no such checkpoint in {directory}'
    )
    raise UserError(
      f'--step={step[:80]}: {problem}; there are '
      f'{", ".join(map(str, sorted(places)))}, best and latest'
    )
  try:
    return _watched(_read, places[number], number)
  except _Replaced:
    raise
  except Exception as error:  # Whatever damage does to a decoder.
    raise UserError(damage(number, error)) from error


def _newest(places: Places, read_one: Callable) -> Any:
  """read_one(directory, step) of the newest where it raises nothing."""
  failures = []
  for step in sorted(places, reverse=True):
    try:
      found = _watched(read_one, places[step], step)
    except _Replaced:
      raise
    except Exception as error:  # Whatever damage does to a decoder.
      failures.append(damage(step, error))
      continue
    for failure in failures:
      log.warning('%s; using %d', failure, step)
    return found
  raise UserError(failures)


def _places(directory: pathlib.Path) -> Places:
  """Returns where the checkpoints of a run are, including superseded ones.

  A checkpoint is superseded, until the new one of its step is on the disk, by a
  trainer that saves a step again. A trainer that starts puts it back.
  """
  aside = superseded(directory)
  # Listed twice: whichever way one is moved meanwhile, it is in a list.
  return {
    **dict.fromkeys(steps_in(directory), directory),
    **dict.fromkeys(steps_in(aside), aside),
    **dict.fromkeys(steps_in(directory), directory),
  }


def superseded(directory: pathlib.Path) -> pathlib.Path:
  """Returns the directory of checkpoints that are being saved again."""
  return directory.with_name('superseded_checkpoints')


def _watched(read_one: Callable, directory: pathlib.Path, step: int) -> Any:
  """Returns read_one(directory, step).

  Raises:
    _Replaced: it failed, and the files are not those that it began with.
  """
  path = directory / str(step)
  before = _files(path)
  try:
    return read_one(directory, step)
  except Exception as error:
    if _changes(path, before):
      raise _Replaced(f'checkpoint {step} was replaced') from error
    raise


def _changes(path: pathlib.Path, before: dict[str, tuple]) -> bool:
  """Returns whether `path` is gone or changes, now or within a moment.

  A deletion that began before the first look may not have ended yet.
  """
  end = time.monotonic() + _SETTLE_SECONDS
  while path.is_dir() and _files(path) == before:
    if time.monotonic() > end:
      return False
    time.sleep(0.02)
  return True


def _files(path: pathlib.Path) -> dict[str, tuple]:
  """Returns {path: what differs once it is changed or replaced}."""
  found = {}
  for parent, _, names in os.walk(path):
    for name in ('', *names):
      try:
        status = os.lstat(os.path.join(parent, name))
      except OSError:  # It was deleted since it was listed.
        continue
      found[os.path.join(parent, name)] = (
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
      )
  return found


def steps_in(directory: pathlib.Path) -> list[int]:
  names = [path.name for path in directory.glob('*') if path.is_dir()]
  return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)


def _read(directory, step):
  meta = read_meta(directory, step)
  return read_arrays(directory, step, meta), meta


def read_meta(directory: pathlib.Path, step: int) -> dict[str, Any]:
  """Raises ValueError if it changed, and whatever damage does to a decoder."""
  meta = _read_item(directory, step, 'meta', ocp.args.JsonRestore())
  if not isinstance(meta, dict) or 'leaves' not in meta:
    raise ValueError('it is of something else')
  recorded = meta.pop('digest', None)
  if recorded not in (None, digest(meta)):
    raise ValueError('what it tells of itself changed on the disk')
  if meta.get('step', step) != step:
    raise ValueError(f'it is of step {meta["step"]}')
  return meta


def read_arrays(
  directory: pathlib.Path,
  step: int,
  meta: dict[str, Any],
  wanted: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """By name; of the shapes and on the devices of `wanted`.

  Raises ValueError, naming one, if they are not what `meta` says was saved,
  and whatever damage does to a decoder.
  """
  if not jax.config.values[
    'jax_enable_x64'
  ]:  # They would be read as 32-bit ones.
    wide = [n for n, kind in meta['leaves'].items() if kind.startswith(_WIDE)]
    if wide:
      raise ValueError(
        f'{wide[0]} is {meta["leaves"][wide[0]]}: it was saved under '
        'JAX_ENABLE_X64=1, and is read under it alone'
      )
  args = ocp.args.StandardRestore(wanted)  # pyright: ignore
  arrays = _read_item(directory, step, 'arrays', args)
  recorded = meta.get('content', {})  # Older ones have none.
  found = arrays_lib.fingerprints(arrays)
  changed = [name for name in recorded if recorded[name] != found.get(name)]
  if changed:
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    raise ValueError(f'{changed[0]}{more} changed on the disk')
  return arrays


def _read_item(directory, step, name, args):
  handler = {
    'arrays': ocp.StandardCheckpointHandler,
    'meta': ocp.JsonCheckpointHandler,
  }[name]
  with ocp.Checkpointer(handler()) as checkpointer:
    return checkpointer.restore(
      directory.absolute() / str(step) / name, args=args
    )


def digest(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def damage(step: int, error: Exception) -> str:
  return f'checkpoint {step} is damaged: {told(error)}'


def told(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else repr(error)
