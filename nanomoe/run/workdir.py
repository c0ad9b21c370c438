"""A run's directory: its files, its log, and going on in it."""

from collections.abc import Collection
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

from ml_collections import ConfigDict

from nanomoe.config import schema
from nanomoe.config.overrides import Config
from nanomoe.run import terminal
from trainers.errors import UserError
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)

# What a run in progress may change: when it ends and what it reports, and how
# fast it learns. Anything else would make it another run.
_MAY_CHANGE = (
  'num_train_steps',
  'eval_',
  'log_interval',
  'optimizer.learning_rate',
  'optimizer.schedule.',
  'optimizer.weight_decay',
  'optimizer.decay_mask',
  'optimizer.beta',
  'optimizer.clip_norm',
  'optimizer.spike_factor',
  'confidence_weight',
  'model.remat',
  'moe.aux_weight',
  'moe.z_weight',
  'moe.entropy_weight',
  'moe.eval_dispatch',
  'checkpoint.',
  'callbacks.',
  'writers.',
  'sample.',
  'data.path',  # The text itself may not: its SHA-256 is recorded.
  'data.fallback',
)

# What --allow_changed may name, and the keys that it allows: another run, if
# somebody wants to go on with it all the same. The text's own key is above.
ALLOWABLE = {
  'data': ('data.dataset.',),
  'seed': ('seed',),
  'batch_size': ('batch_size',),
  'tokenizer': ('data.tokenizer.',),
}

# Of what may change, this changes how it ends: never by a file, which may be
# meant for another run, or lack what the command line had.
_BY_NAME_ALONE = (
  'num_train_steps',
  'eval_weights',
  'optimizer.',
  'confidence_weight',
  'moe.aux_weight',
  'moe.z_weight',
  'moe.entropy_weight',
  'moe.eval_dispatch',
)


def make_default(config_path: str) -> pathlib.Path:
  """Makes runs/<config>-<date>-<time>, which no other process has."""
  now = datetime.datetime.now().strftime('%Y%m%d-%H%M%S')
  name = f'{pathlib.Path(config_path).stem}-{now}'
  for number in itertools.count(1):
    path = pathlib.Path('runs') / (f'{name}-{number}' if number > 1 else name)
    try:
      path.mkdir(parents=True)
      return path
    except FileExistsError:  # Two starts within a second.
      continue
    except OSError as error:
      raise UserError(f'{path} cannot be made: {error.strerror}') from error
  raise AssertionError('unreachable')


def read_config(workdir: pathlib.Path) -> ConfigDict | None:
  """The config of the run in `workdir`, or None if there is no run."""
  path = workdir / 'config.json'
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(values, dict) or not values:
      raise ValueError('it is not an object with keys')
    return ConfigDict(schema.upgraded(values))
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
  if lines := schema.problems(config.to_dict()):
    raise UserError([f'{workdir / "config.json"}: {line}' for line in lines])
  return config


def resume_config(
  old: ConfigDict,
  new: ConfigDict,
  asked: Collection[str],
  allow_changed: Collection[str] = (),
) -> ConfigDict:
  """`new`, with what `old` had decided; the changes are logged.

  Args:
    old: the config of the run.
    new: the one to go on with.
    asked: the keys that were given by name; what else differs came with a
      file.
    allow_changed: of `ALLOWABLE`.

  Raises:
    UserError: naming every key that may not change within a run, or not
      without being asked for.
  """
  before = dict(schema.flatten(old.to_dict()))
  after = dict(schema.flatten(new.to_dict()))
  decided = new.copy_and_resolve_references()
  for key in ('precision', 'moe.dispatch', 'moe.eval_dispatch'):
    if after[key] == 'auto' and before.get(key):
      after[key] = before[key]
      with decided.unlocked():
        decided.update_from_flattened_dict({key: before[key]})
  changed = [
    key for key in {**before, **after} if before.get(key) != after.get(key)
  ]
  specs = tuple(k.removesuffix('type') for k in asked if k.endswith('.type'))
  lines = []
  for key in changed:
    tell = (
      f'{key} was {before.get(key)!r} in this run, and is {after.get(key)!r} '
      'now: '
    )
    names = [n for n, keys in ALLOWABLE.items() if key.startswith(keys)]
    if set(names) & set(allow_changed):
      pass
    elif not key.startswith(_MAY_CHANGE):
      hint = f', or --allow_changed={names[0]}' if names else ''
      lines.append(f'{tell}choose another --workdir{hint}')
    elif (
      key.startswith(_BY_NAME_ALONE)
      and key not in asked
      and not key.startswith(specs)
    ):
      lines.append(
        tell + f'to change it, give --config.{key}; to go on as it was, leave '
        'out --config'
      )
  if lines:
    raise UserError(lines)
  for key in changed:
    log.info('changed: %s from %r to %r', key, before.get(key), after.get(key))
  return decided


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
  try:
    place = next(
      p for p in (workdir, *workdir.absolute().parents) if p.exists()
    )
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
