"""Reading and verifying checkpoints, also of a run in progress."""

from collections.abc import Callable
import functools
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
from trainers.checkpoint import items
from trainers.errors import UserError, first_line

log = logging.getLogger(__name__)

# Limit of attempts, for a trainer that keeps replacing the checkpoint.
_ATTEMPTS = 30
# Orbax deletes the directories 0.1 s after the files: a failed read waits this
# long for signs that its checkpoint is being deleted.
_SETTLE_SECONDS = 1.0

# {step: parent of the directory of that step}.
Places = dict[int, pathlib.Path]


class _Replaced(Exception):
  """Error: a process deleted, moved or replaced a checkpoint during a read."""


_WIDE = ('float64', 'int64', 'uint64', 'complex128')


class Layout(NamedTuple):
  """Layout of the arrays in checkpoints.

  Attributes:
    version: Number of the layout; checkpoints without a number have 1.
    upgrade: Function from arrays by name, in an older layout, to arrays in this
      one, of the same names, dtypes and shapes.
  """

  version: int = 1
  upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda arrays: arrays

  def needs_upgrade(self, meta: dict[str, Any]) -> bool:
    """Returns whether a checkpoint has an older layout.

    Args:
      meta: JSON values of the checkpoint.

    Raises:
      UserError: The layout is newer.
    """
    found = meta.get('layout', 1)
    if found > self.version:
      raise UserError(
        [
          'the checkpoint is of a newer version:',
          f'its layout is {found}, and this version reads up to {self.version}',
        ]
      )
    return found < self.version


class Saved(NamedTuple):
  """Content of a checkpoint.

  Attributes:
    tree: Tree of arrays.
    meta: JSON values, such as the step and the states of callbacks.
  """

  tree: Any
  meta: dict[str, Any]


def read(
  directory: pathlib.Path,
  step: str,
  layout: Layout | None = None,
  prefixes: tuple[str, ...] = ('',),
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a checkpoint, without writing to the directory.

  The run may be in progress. If its trainer replaces the checkpoint during the
  read, the read starts again with the checkpoints that exist by then.

  Args:
    directory: Directory of the run's checkpoints.
    step: Number of a step, 'best' (by the monitored metric; before its first
      evaluation, 'latest') or 'latest' (the newest intact checkpoint).
    layout: Layout of the arrays that are returned; None for that in which they
      were saved.
    prefixes: Beginnings of the names of the arrays to read. The files of other
      arrays may be damaged.

  Returns:
    ({name: array}, meta). The arrays are on the first device, however they were
    sharded.

  Raises:
    UserError: There is no such checkpoint, it is damaged, or it was replaced
      during each of the reads.
  """
  for attempt in range(_ATTEMPTS):
    try:
      arrays, meta = _attempt(directory, step, prefixes, again=attempt > 0)
    except _Replaced as replaced:
      log.debug('%s; reading again', replaced)
      continue
    if layout and layout.needs_upgrade(meta):
      arrays = layout.upgrade(arrays)
    return arrays, meta
  raise UserError(
    f'--step={step}: the checkpoints in {directory} were replaced while they '
    f'were read, {_ATTEMPTS} times in a row; try again, or let the run keep '
    'more of them with checkpoint.keep_latest'
  )


def _attempt(
  directory: pathlib.Path, step: str, prefixes: tuple[str, ...], again: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a checkpoint once, as `read` does.

  Args:
    directory: Directory of the run's checkpoints.
    step: Step, as in `read`.
    prefixes: Beginnings of names, as in `read`.
    again: Whether an earlier attempt found the checkpoint.

  Raises:
    _Replaced: Another process changed the checkpoint during the read.
    UserError: As in `read`.
  """
  places = _places(directory)
  if not places:
    raise UserError(f'{directory}: there is no checkpoint')
  read_one = functools.partial(_read, prefixes=prefixes)
  if step == 'latest':
    return _newest(places, read_one)
  number = next((n for n in places if str(n) == step), None)
  if step == 'best':
    meta = _newest(places, read_meta)
    if not meta['best']:
      found = _newest(places, read_one)
      log.warning(
        'no checkpoint is the best before a finite evaluation; using %d',
        found[1]['step'],
      )
      return found
    number = meta['best'][0]
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
    return _watched(read_one, places[number], number)
  except _Replaced:
    raise
  except Exception as error:  # A decoder of damaged data may raise anything.
    raise UserError(damage(number, error)) from error


def _newest(places: Places, read_one: Callable) -> Any:
  """Returns read_one(directory, step) of the newest intact checkpoint."""
  failures = []
  for step in sorted(places, reverse=True):
    try:
      found = _watched(read_one, places[step], step)
    except _Replaced:
      raise
    except Exception as error:  # A decoder of damaged data may raise anything.
      failures.append(damage(step, error))
      continue
    for failure in failures:
      log.warning('%s; using %d', failure, step)
    return found
  raise UserError(failures)


def _places(directory: pathlib.Path) -> Places:
  """Returns the directory of each checkpoint, including superseded ones.

  A trainer that saves a step again supersedes the checkpoint of that step until
  the new one is on the disk. A trainer that starts restores it.
  """
  aside = superseded(directory)
  # A trainer may move a checkpoint meanwhile, either way: a directory that is
  # listed twice, before and after the other, does not miss it.
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
    _Replaced: The read failed, and the files changed since it began.
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
  """Returns whether `path` is deleted or changes within `_SETTLE_SECONDS`.

  A deletion that began before `before` was listed may still be in progress.
  """
  end = time.monotonic() + _SETTLE_SECONDS
  while path.is_dir() and _files(path) == before:
    if time.monotonic() > end:
      return False
    time.sleep(0.02)
  return True


def _files(path: pathlib.Path) -> dict[str, tuple]:
  """Returns {path: (inode, size, modification time)} of all files in `path`."""
  found = {}
  for parent, _, names in os.walk(path):
    for name in ('', *names):
      try:
        status = os.lstat(os.path.join(parent, name))
      except OSError:  # The file was deleted since it was listed.
        continue
      found[os.path.join(parent, name)] = (
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
      )
  return found


def steps_in(directory: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints in `directory`, in ascending order."""
  names = [path.name for path in directory.glob('*') if path.is_dir()]
  return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)


def _read(
  directory: pathlib.Path, step: int, prefixes: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
  meta = read_meta(directory, step)

  def part(values: dict[str, Any]) -> dict[str, Any]:
    return {n: x for n, x in values.items() if n.startswith(prefixes)}

  content = part(meta.get('content', {}))
  wanted = arrays_lib.on_one_device(part(meta['leaves']))
  arrays = read_arrays(directory, step, meta, wanted)
  verify(arrays, {**meta, 'content': content})
  return arrays, meta


def read_meta(directory: pathlib.Path, step: int) -> dict[str, Any]:
  """Reads the JSON values of a checkpoint.

  Args:
    directory: Directory of the checkpoint's directory.
    step: Step of the checkpoint.

  Raises:
    ValueError: The values are not those that were saved.
    Exception: The decoder failed on damaged data.
  """
  meta = items.read(directory, step, 'meta', ocp.args.JsonRestore())
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
  wanted: dict[str, Any],
) -> dict[str, Any]:
  """Reads arrays of a checkpoint; `verify` compares them.

  Args:
    directory: Directory of the checkpoint's directory.
    step: Step of the checkpoint.
    meta: JSON values of the checkpoint, with the fingerprints.
    wanted: Shapes, dtypes and shardings of the arrays, by name.

  Returns:
    The arrays by name.

  Raises:
    ValueError: The arrays were saved under JAX_ENABLE_X64.
    Exception: The decoder failed on damaged data.
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
  args = ocp.args.PyTreeRestore(  # pyright: ignore
    wanted,  # pyright: ignore
    ocp.checkpoint_utils.construct_restore_args(wanted),  # pyright: ignore
    partial_restore=True,  # pyright: ignore
  )
  return items.read(directory, step, 'arrays', args)


def verify(arrays: dict[str, Any], meta: dict[str, Any]) -> None:
  """Compares arrays with the fingerprints of their checkpoint.

  Args:
    arrays: Arrays by name, of all processes together.
    meta: JSON values of the checkpoint, with the fingerprints.

  Raises:
    ValueError: Arrays are not those that were saved. One is named.
  """
  recorded = meta.get('content', {})  # Checkpoints of old versions lack it.
  found = arrays_lib.fingerprints(arrays)
  changed = [name for name in recorded if recorded[name] != found.get(name)]
  if changed:
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    raise ValueError(f'{changed[0]}{more} changed on the disk')


def digest(meta: dict[str, Any]) -> str:
  """Returns the SHA-256 of the JSON values of a checkpoint, in hexadecimal."""
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def damage(step: int, error: Exception) -> str:
  """Returns a line that says that a checkpoint is damaged, with the reason."""
  return f'checkpoint {step} is damaged: {first_line(error)}'
