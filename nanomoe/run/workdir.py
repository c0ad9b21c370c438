"""Workdir of a run: its config, its log and its lock."""

import datetime
import fcntl
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

from nanomoe.config import older, schema, validation
from nanomoe.config.schema import Config
from nanomoe.run import terminal
from trainers.errors import UserError
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)

_FORMAT = logging.Formatter('%(asctime)s %(levelname)s %(message)s')
_LOCK_ATTEMPTS = 4  # 0.1 s apart.


def make_default(config_path: str) -> pathlib.Path:
  """Makes and returns runs/<config>-<date>-<time>, a new directory.

  Args:
    config_path: Path of the config file.

  Raises:
    UserError: The directory cannot be made.
  """
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  name = f'{pathlib.Path(config_path).stem}-{now}'
  runs = pathlib.Path('runs')
  if lines := problems(runs / name):
    raise UserError(lines)
  for number in itertools.count(1):
    path = runs / (f'{name}-{number}' if number > 1 else name)
    try:
      runs.mkdir(exist_ok=True)
    except OSError as error:
      raise UserError(
        f'--workdir={runs}: the directory cannot be made ({error.strerror})'
      ) from error
    try:
      path.mkdir()
      return path
    except FileExistsError:  # Two runs started within a second.
      continue
    except OSError as error:
      raise UserError(
        f'--workdir={path}: the directory cannot be made ({error.strerror})'
      ) from error
  raise AssertionError('unreachable')


def read_config(workdir: pathlib.Path) -> Config | None:
  """Returns the config of the run in `workdir`, or None if there is no run.

  Keys that an older version lacked get the values by which it behaved.

  Raises:
    UserError: config.json cannot be read or is damaged.
  """
  path = workdir / 'config.json'
  try:
    values = json.loads(path.read_text(encoding='utf-8-sig'))
    if not isinstance(values, dict) or not values:
      raise ValueError('it must be an object with keys')
    return schema.make(older.upgrade(values))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: the file is damaged ({error})') from error


def config_of(workdir: pathlib.Path) -> Config:
  """Returns the checked config of the run in `workdir`.

  Raises:
    UserError: There is no run, or its config.json is damaged or has mistakes.
  """
  config = read_config(workdir)
  if config is None:
    raise UserError(
      f'--workdir={workdir}: there is no run; the directory must contain a '
      'config.json'
    )
  if lines := validation.problems(config.to_dict()):
    raise UserError([f'{workdir / "config.json"}: {line}' for line in lines])
  return config


def discard(workdir: pathlib.Path) -> None:
  """Removes the workdir of a failed start if it contains only a log."""
  made = {path.name for path in workdir.iterdir()}
  begun = any((workdir / 'checkpoints').glob('*'))
  logs = {name for name in made if name.startswith('log.')}
  if made - logs <= {'checkpoints'} and not begun:
    shutil.rmtree(workdir, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value` to `path` as JSON, atomically.

  Raises:
    UserError: The file cannot be written, for example because the disk is full.
  """
  try:
    write_atomically(path, to_json(value, indent=2) + '\n')
  except OSError as error:
    raise UserError(
      f'{path}: the file cannot be written ({error.strerror})'
    ) from error


def problems(workdir: pathlib.Path) -> list[str]:
  """Returns a line for each reason why `workdir` cannot be made or written.

  The check makes no directory.
  """
  try:
    # Checkpoints need a path that is valid UTF-8.
    str(workdir.absolute()).encode()
  except UnicodeEncodeError:
    return [
      f'--workdir={str(workdir)!r}: the path is not UTF-8; it must be UTF-8'
    ]
  except FileNotFoundError:
    return [f'--workdir={workdir}: the current directory does not exist']
  try:
    for existing in (workdir, *workdir.absolute().parents):
      if existing.exists():
        break
      if existing.is_symlink():  # Making the target would be unexpected.
        return [
          f'--workdir={workdir}: {existing} is a link to '
          f'{str(existing.readlink())!r}, which does not exist; it must be a '
          'directory'
        ]
  except (OSError, ValueError) as error:
    return [f'--workdir={workdir}: {getattr(error, "strerror", error)}']
  if not existing.is_dir():
    return [f'--workdir={workdir}: {existing} is not a directory']
  if not os.access(existing, os.W_OK | os.X_OK):
    return [
      f'--workdir={workdir}: {existing} is read-only or permission is denied; '
      'it must be writable'
    ]
  return []


class _LockedLog(logging.FileHandler):
  """Handler of <workdir>/log.txt that locks the log and the workdir.

  The locks belong to the process, so they are released if it is killed.

  Args:
    workdir: Directory of the run.

  Raises:
    BlockingIOError: Another process holds a lock.
  """

  def __init__(self, workdir: pathlib.Path):
    super().__init__(
      workdir / 'log.txt', encoding='utf-8', errors='backslashreplace'
    )
    # Two locks: the lock of the directory survives a deleted log, and the log
    # can be locked on file systems without locks of directories (NFS).
    self._directory: int | None = os.open(workdir, os.O_RDONLY)
    errors = []
    for descriptor in (self.stream.fileno(), self._directory):  # pyright: ignore
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        self.close()
        raise
      except OSError as error:
        errors.append(error)
    if len(errors) == 2:
      log.warning('%s cannot be locked: %s', workdir, errors[0])

  def close(self) -> None:
    super().close()
    if self._directory is not None:
      os.close(self._directory)
    self._directory = None


def _locked_log(workdir: pathlib.Path) -> _LockedLog:
  """Locks the workdir; arguments and errors are those of `_LockedLog`.

  `history.is_locked` holds the lock of the log for a moment: a few attempts.
  """
  for _ in range(_LOCK_ATTEMPTS - 1):
    try:
      return _LockedLog(workdir)
    except BlockingIOError:
      time.sleep(0.1)
  return _LockedLog(workdir)


def log_to(workdir: pathlib.Path) -> None:
  """Makes the workdir, locks it, and adds its log.txt to the loggers.

  Raises:
    UserError: The workdir cannot be written, or another process holds its lock.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handler = _locked_log(workdir)
    with tempfile.TemporaryFile(dir=workdir):
      pass  # An existing log can be writable in a read-only directory.
  except BlockingIOError as error:
    raise UserError(
      f'--workdir={workdir}: another process is training in this directory; '
      'choose another workdir'
    ) from error
  except OSError as error:
    raise UserError(
      f'--workdir={workdir}: the directory cannot be written ({error.strerror})'
    ) from error
  handler.setFormatter(_FORMAT)
  for name in terminal.LOGGERS:
    logging.getLogger(name).addHandler(handler)


def log_warnings_to(workdir: pathlib.Path, process_id: int) -> None:
  """Makes warnings in log.<process_id>.txt the only log of this process.

  Args:
    workdir: Directory of the run.
    process_id: Index of the process, which is not the first.
  """
  handler = logging.FileHandler(
    workdir / f'log.{process_id}.txt',
    encoding='utf-8',
    errors='backslashreplace',
    delay=True,  # A process without warnings makes no file.
  )
  handler.setLevel(logging.WARNING)
  handler.setFormatter(_FORMAT)
  for name in terminal.LOGGERS:
    logging.getLogger(name).handlers = [handler]
