"""Writer of one checkpoint directory at a time, by all processes together.

Each process writes its own parts of the arrays, with Orbax. Process 0 then
merges them and renames the directory, which commits the checkpoint. The
processes agree after each stage: a failure of one fails the save on all.
"""

import asyncio
from collections.abc import Callable, Collection
from concurrent import futures
import contextlib
import json
import os
import pathlib
import shutil
import threading
from typing import Any

from etils import epath
import orbax.checkpoint as ocp

from trainers.files import write_atomically
from trainers.runtime import processes

UNFINISHED = ocp.utils.TMP_DIR_SUFFIX


class Saver:
  """Background writer of `<directory>/<step>/`.

  Args:
    directory: Absolute path of the directory of checkpoints.
    on_commit: Called on process 0 once a checkpoint is committed.
  """

  def __init__(self, directory: pathlib.Path, on_commit: Callable[[], None]):
    self._directory = directory
    self._on_commit = on_commit
    self._handler = ocp.StandardCheckpointHandler()
    self._group = processes.group('save', is_patient=True)
    self._saving: futures.Future[None] | None = None

  def start(
    self,
    step: int,
    arrays: dict[str, Any],
    meta: dict[str, Any],
    prepare: Callable[[], None],
    obsolete: Callable[[], Collection[int]],
  ) -> None:
    """Copies arrays, then writes them in the background.

    Args:
      step: Step of the checkpoint.
      arrays: Arrays by name.
      meta: JSON values of the checkpoint.
      prepare: Makes room for the directory; process 0 calls it.
      obsolete: Returns the steps to delete; process 0 calls it after the
        commit.

    Raises:
      Exception: The save cannot start, on this or another process.
    """
    copied, self._saving = futures.Future(), futures.Future()
    arguments = step, arrays, meta, prepare, obsolete
    threading.Thread(
      target=self._run,
      args=[copied, self._saving, arguments],
      name='save',
    ).start()
    try:
      copied.result()
    except BaseException:
      self._saving = None
      raise

  def wait(self, seconds: float | None = None) -> None:
    """Waits until the last save is committed.

    Args:
      seconds: Bound of the wait; None for none.

    Raises:
      Exception: The save failed, on this or another process, or takes longer.
    """
    saving, self._saving = self._saving, None
    if saving:
      saving.result(seconds)

  def _run(self, copied, saving, arguments) -> None:
    try:
      self._save(copied, *arguments)
    except BaseException as error:
      if copied.done():
        saving.set_exception(error)
      else:
        copied.set_exception(error)
    else:
      saving.set_result(None)

  def _save(self, copied, step, arrays, meta, prepare, obsolete) -> None:
    temporary = self._directory / f'{step}{UNFINISHED}'

    def make_directory():
      prepare()
      # Orbax makes the inner directory in process 0 while it writes. The other
      # processes would wait for it for ten minutes if that write failed.
      (temporary / 'arrays' / 'array_metadatas').mkdir(parents=True)

    self._group.first(make_directory)
    writes: list[Any] = []
    try:
      self._on_all(lambda: writes.extend(self._copy(temporary, arrays)))
    except BaseException:
      # Process 0 deletes this directory, and the next save uses it: no writer
      # of any process may outlive a failed save.
      for write in writes:
        _error_of(write)
      self._group.gather(None)
      raise
    copied.set_result(None)

    def finish_writing():
      errors = [error for write in writes if (error := _error_of(write))]
      if errors:
        raise errors[0]

    self._on_all(finish_writing)
    # A network file system may show the files of other processes late.
    part = temporary / 'arrays' / f'ocdbt.process_{self._group.index}'
    parts = self._group.gather(part.name if part.exists() else None)

    def commit():
      for name in filter(None, parts):
        if not (temporary / 'arrays' / name).exists():
          raise FileNotFoundError(
            f'{temporary / "arrays" / name}: process 0 does not see this '
            'directory of another process'
          )
      self._handler.finalize(epath.Path(temporary / 'arrays'))
      _write_meta(temporary, meta)
      os.replace(temporary, self._directory / str(step))
      self._on_commit()
      for old in obsolete():
        delete(self._directory, old)

    self._group.first(commit)

  def _copy(self, temporary: pathlib.Path, arrays: dict[str, Any]) -> Any:
    """Starts to write the arrays; their memory may change after this call."""
    args = ocp.args.StandardSave(arrays)  # pyright: ignore
    path = epath.Path(temporary / 'arrays')
    return asyncio.run(self._handler.async_save(path, args=args)) or []

  def _on_all(self, call: Callable[[], Any]) -> None:
    """Calls a function, and raises if it raises on one of the processes."""
    error = None
    try:
      call()
    except Exception as raised:  # Storage backends of Orbax may raise anything.
      error = raised
    self._group.check(error)


def _error_of(write: Any) -> Exception | None:
  try:
    write.result()
  except Exception as error:  # Storage backends of Orbax may raise anything.
    return error
  return None


def _write_meta(temporary: pathlib.Path, meta: dict[str, Any]) -> None:
  (temporary / 'meta').mkdir()
  write_atomically(temporary / 'meta' / 'metadata', json.dumps(meta))


def delete(directory: pathlib.Path, step: int) -> None:
  """Deletes a checkpoint. A kill leaves it whole, or unfinished.

  Args:
    directory: Directory of the checkpoints.
    step: Step of the checkpoint.
  """
  gone = directory / f'{step}.deleted{UNFINISHED}'
  with contextlib.suppress(OSError):  # The next save tries it again.
    (directory / str(step)).rename(gone)
  shutil.rmtree(gone, ignore_errors=True)


def delete_unfinished(directory: pathlib.Path) -> None:
  """Deletes the directories of saves and deletions that did not finish.

  Orbax's writers may outlive a failed save and create their directory again.

  Args:
    directory: Directory of the checkpoints.
  """
  for unfinished in directory.glob(f'*{UNFINISHED}*'):
    shutil.rmtree(unfinished, ignore_errors=True)
