"""A run's directory: its files, its log, and going on in it."""

import datetime
import fcntl
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
from typing import Any

from nanomoe.config import older, schema, validation
from nanomoe.config.schema import Config
from nanomoe.run import terminal
from trainers.errors import UserError
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)


def make_default(config_path: str) -> pathlib.Path:
  """Makes runs/<config>-<date>-<time>, which no other process has."""
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
      raise UserError(f'{runs} cannot be made: {error.strerror}') from error
    try:
      path.mkdir()
      return path
    except FileExistsError:  # Two starts within a second.
      continue
    except OSError as error:
      raise UserError(f'{path} cannot be made: {error.strerror}') from error
  raise AssertionError('unreachable')


def read_config(workdir: pathlib.Path) -> Config | None:
  """The config of the run in `workdir`, or None if there is no run."""
  path = workdir / 'config.json'
  try:
    values = json.loads(path.read_text(encoding='utf-8-sig'))
    if not isinstance(values, dict) or not values:
      raise ValueError('it is not an object with keys')
    return schema.make(older.upgrade(values))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is damaged: {error}') from error


def config_of(workdir: pathlib.Path) -> Config:
  """As `read_config`; raises UserError if there is no run, or not one of ours.

  An older version's config may lack keys.
  """
  config = read_config(workdir)
  if config is None:
    raise UserError(f'--workdir={workdir}: no run is there (no config.json)')
  if lines := validation.problems(config.to_dict()):
    raise UserError([f'{workdir / "config.json"}: {line}' for line in lines])
  return config


def discard(workdir: pathlib.Path) -> None:
  """Removes a directory, made for a mistake, that has nothing but its log."""
  made = {path.name for path in workdir.iterdir()}
  begun = any((workdir / 'checkpoints').glob('*'))
  if made <= {'log.txt', 'checkpoints'} and not begun:
    shutil.rmtree(workdir, ignore_errors=True)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Raises UserError if it cannot be written: the disk is full, for example."""
  try:
    write_atomically(path, to_json(value, indent=2) + '\n')
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error


def problems(workdir: pathlib.Path) -> list[str]:
  """What is in the way of making or writing `workdir`; makes nothing."""
  try:
    str(workdir.absolute()).encode()  # Or no checkpoint could be written there.
  except UnicodeEncodeError:
    return [f'--workdir={str(workdir)!r}: its name is not UTF-8']
  except FileNotFoundError:
    return [f'--workdir={workdir}: the current directory does not exist']
  try:
    for place in (workdir, *workdir.absolute().parents):
      if place.exists():
        break
      if place.is_symlink():  # Its target is not made: nobody asked for it.
        return [
          f'--workdir={workdir} cannot be made: {place} is a link to '
          f'{str(place.readlink())!r}, which does not exist'
        ]
  except (OSError, ValueError) as error:
    return [f'--workdir={workdir}: {getattr(error, "strerror", error)}']
  if not place.is_dir():
    return [f'--workdir={workdir} cannot be made: {place} is no directory']
  if not os.access(place, os.W_OK | os.X_OK):
    return [
      f'--workdir={workdir} cannot be written: permission denied, or read-only'
    ]
  return []


class _LockedLog(logging.FileHandler):
  """<workdir>/log.txt, and the only one: held, with the directory, while open.

  A lock is of the process: nothing is left of it where that was killed.

  Raises:
    BlockingIOError: another process has it.
  """

  def __init__(self, workdir: pathlib.Path):
    super().__init__(
      workdir / 'log.txt', encoding='utf-8', errors='backslashreplace'
    )
    # Whoever deletes the log does not unlock the directory; where directories
    # cannot be locked (NFS), the log can.
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


def log_to(workdir: pathlib.Path) -> None:
  """Makes the directory, logs to its log.txt too, and keeps others out.

  Raises:
    UserError: it cannot be written, or another process trains there.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    handler = _LockedLog(workdir)
    with tempfile.TemporaryFile(dir=workdir):
      pass  # It can be written to: the log could be, by itself.
  except BlockingIOError as error:
    raise UserError(
      f'--workdir={workdir}: another process is training there'
    ) from error
  except OSError as error:
    raise UserError(
      f'--workdir={workdir} cannot be written: {error.strerror}'
    ) from error
  handler.setFormatter(
    logging.Formatter('%(asctime)s %(levelname)s %(message)s')
  )
  for name in terminal.LOGGERS:
    logging.getLogger(name).addHandler(handler)
