"""Reader of config files and of overrides on the command line.

This module replaces the flags of ml_collections, because it reports all
mistakes at once, one line each, and accepts the arguments of a spec.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
import sys
import types
from typing import Any, TypeVar

from ml_collections import ConfigDict, config_dict

import nanomoe
from nanomoe.config import home, older, schema, validation
from nanomoe.config.schema import Config
from trainers import spec as spec_lib
from trainers.errors import UserError

_T = TypeVar('_T')
Override = tuple[str, str]  # Key and value, both as given.
MAX_JOBS = 10_000  # Of a sweep.


def split_arguments(argv: list[str]) -> tuple[list[str], list[Override]]:
  """Returns the arguments without overrides, and the overrides.

  An override is `--config.key=value` or `--config.key value`.

  Args:
    argv: Arguments of a command.

  Raises:
    UserError: The last argument is an override without a value.
  """
  rest, overrides = [], []
  words = iter(argv)
  for word in words:
    if word == '--':
      return [*rest, word, *words], overrides
    match = re.fullmatch(r'--?config\.([^=]*)(?:=(.*))?', word, re.DOTALL)
    if not match:
      rest.append(word)
      continue
    key, value = match.groups()
    if value is None:
      value = next(words, None)
    if value is None:
      raise UserError(
        f'--config.{key}: the value is missing; it must be --config.{key}=VALUE'
      )
    overrides.append((key, value))
  return rest, overrides


def load_file(path: str) -> Config:
  """Returns the config that get_config() of a Python file returns.

  Args:
    path: Path of the file. `FILE.py:ARGUMENT` calls get_config('ARGUMENT'), as
      ml_collections does.

  Raises:
    UserError: The file does not exist or fails, or its get_config() does not
      return a ConfigDict, or takes no argument, or needs one.
  """
  argument = _split_argument(path)[1]

  def read(module):
    if not hasattr(module, 'get_config'):
      raise UserError(
        f'--config={path}: get_config is missing; it must be a function that '
        'returns a ConfigDict'
      )
    config = module.get_config(*_arguments(path, module, argument))
    if not isinstance(config, ConfigDict):
      raise UserError(f'--config={path}: get_config() must return a ConfigDict')
    return plain(config)

  return _read_module(path, read)


def load_sweep(path: str) -> list[dict[str, Any]]:
  """Returns what sweep() of a config file yields, or [] without a sweep().

  Args:
    path: Path of the file, as in `load_file`.

  Raises:
    UserError: The file does not exist or fails, or sweep() yields something
      other than {key: value}.
  """

  def read(module):
    if not hasattr(module, 'sweep'):
      return []
    found = list(itertools.islice(module.sweep(), MAX_JOBS + 1))
    if len(found) > MAX_JOBS:
      raise UserError(
        f'--config={path}: sweep() yields over {MAX_JOBS} jobs; it must end'
      )
    if not found:
      raise UserError(f'--config={path}: sweep() yields no job')
    for item in found:
      if not isinstance(item, Mapping) or not all(
        isinstance(key, str) for key in item
      ):
        raise UserError(
          f'--config={path}: sweep() yields {validation.shown(str(item))}; it '
          'must yield dicts of dotted keys and values'
        )
    return [dict(item) for item in found]

  return _read_module(path, read)


def _read_module(path: str, read: Callable[[types.ModuleType], _T]) -> _T:
  """Returns `read` of the module of a config file.

  Raises:
    UserError: The file does not exist, or the file or `read` fails.
  """
  name = _split_argument(path)[0]
  try:
    file = pathlib.Path(home.expand(name, '--config'))
    # Configs of NanoMoE are found from any current directory.
    if not file.exists():
      installed = pathlib.Path(__file__).parents[2] / name
      file = installed if installed.is_file() else file
    is_file = file.is_file()
  except OSError as error:  # For example, the name is too long.
    raise UserError(f'--config={path}: {error.strerror}') from error
  if not is_file:
    near = sorted(str(p) for p in file.parent.glob('*.py'))
    near = [p for p in near if not p.endswith('__init__.py')]
    hint = f'; files there are {", ".join(near[:8])}' if near else ''
    raise UserError(f'--config={path}: no such file{hint}')
  file = file.absolute()  # Frames of a traceback have the absolute path.
  # The prefix keeps a file random.py from replacing the module random.
  name = f'config_file_{re.sub(r"[^a-zA-Z0-9]", "_", file.stem)}'
  spec = importlib.util.spec_from_file_location(name, file)
  if spec is None or spec.loader is None:
    raise UserError(
      f'--config={path}: it is not a Python file; it must be NAME.py'
    )
  module = importlib.util.module_from_spec(spec)
  try:
    with _importable(name, module, file.parent):
      spec.loader.exec_module(module)
      return read(module)
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # The file can raise anything.
    where = spec_lib.raised(error, str(file))
    raise UserError(f'--config={path}: {where}') from error


def _split_argument(path: str) -> tuple[str, str | None]:
  """Returns the path of a config file and the argument behind it, if any."""
  match = re.fullmatch(r'(.*\.py):(.*)', path, re.DOTALL)
  return (match[1], match[2]) if match else (path, None)


def _arguments(
  path: str, module: types.ModuleType, argument: str | None
) -> tuple[str, ...]:
  """Returns the arguments for get_config() of a config file.

  Raises:
    UserError: get_config() takes no argument, or needs one.
  """
  given = () if argument is None else (argument,)
  try:
    inspect.signature(module.get_config).bind(*given)
  except TypeError as error:
    takes = 'takes no argument' if given else 'needs an argument: FILE.py:ARG'
    raise UserError(f'--config={path}: get_config() {takes}') from error
  return given


@contextlib.contextmanager
def _importable(name: str, module: types.ModuleType, directory: pathlib.Path):
  """Registers `module` as `name`, and lets it import files of `directory`.

  Dataclasses, typing and unpickling look up the module of a class in
  sys.modules, even after the file was read. So a module stays registered unless
  it failed.
  """
  # If the program has imported a user's package `configs`, that package stays.
  if 'configs' not in sys.modules:
    nanomoe.import_own('configs')
  sys.modules[name] = module
  before = list(sys.path)
  # The end of the path: files beside a config file hide no installed package.
  sys.path.append(str(directory))
  try:
    yield
  except BaseException:
    sys.modules.pop(name, None)
    raise
  finally:
    # If the config file has changed sys.path, its change stays.
    if sys.path == [*before, str(directory)]:
      sys.path.pop()


def plain(config: ConfigDict) -> Config:
  """Returns a config without references, with today's names of values."""
  return schema.make(older.rename(_plain(config)))


def from_values(values: Mapping[str, Any]) -> list[Override]:
  """Returns overrides, given Python values.

  Args:
    values: Values by dotted key; sections may be nested.
  """
  overrides = []
  for key, value in schema.flatten(_plain(values)):
    if isinstance(value, os.PathLike):
      value = os.fspath(value)
    if hasattr(value, 'tolist'):  # NumPy and JAX arrays have it.
      value = value.tolist()
    # The text '5' of an argument would otherwise be read as a number.
    is_argument = key not in schema.FIELDS and not key.endswith('.type')
    overrides.append((key, repr(value) if is_argument else str(value)))
  return overrides


def _plain(value: Any) -> Any:
  """Returns a value with references resolved and sequences as lists, for JSON.

  A required value that is missing becomes None. No key allows None, so an
  override must set the key, or the check of the config reports it.
  """
  if isinstance(value, config_dict.FieldReference):
    try:
      value = value.get()
    except config_dict.RequiredValueError:
      return None
  if isinstance(value, ConfigDict):
    items = value.iteritems(preserve_field_references=True)
    return {k: _plain(v) for k, v in items}
  if isinstance(value, Mapping):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


def apply(config: Config, overrides: list[Override]) -> Config:
  """Returns a checked copy of `config` with `overrides`.

  Args:
    config: Config of a file or of a run.
    overrides: Keys and values as given; the last override of a key wins.

  Raises:
    UserError: A line for each mistake in the config and in the overrides.
  """
  values = older.rename(config.to_dict())
  lines = []
  # Types come first: a new type removes the arguments of the old type.
  for key, text in sorted(overrides, key=lambda o: not o[0].endswith('.type')):
    if not validation.known(key):
      lines.append(validation.unknown(key))
      continue
    try:
      value = _parse(key, older.renamed(key, text))
    except (ValueError, OverflowError):
      field = schema.FIELDS[key]
      lines.append(
        f'config.{key}={validation.shown(text)}: it must be {field.allowed}'
      )
      continue
    *sections, name = key.split('.')
    section = values
    for part in sections:
      section = section.setdefault(part, {})
      if not isinstance(section, dict):
        break  # A value stands in place of a section: reported below.
    else:
      _assign(section, key, value)
  lines += _expand_paths(values)
  lines += validation.problems(values)
  if lines:
    raise UserError(lines)
  for key, field in schema.FIELDS.items():
    *sections, name = key.split('.')
    section = values
    for part in sections:
      section = section[part]
    section[name] = field.kind(section[name])  # A float key can hold an int.
  for section, name in ((values['data'], 'path'), (values, 'init_from')):
    try:
      section[name] = section[name] and os.path.abspath(section[name])
    except FileNotFoundError as error:
      raise UserError(
        f'{name}={section[name]!r}: the current directory does not exist'
      ) from error
  return schema.make(values)


# Keys whose values are paths of user files; data.tokenizer.file only for BPE.
_PATHS = ('data.path', 'init_from', 'data.tokenizer.file')


def _expand_paths(values: dict[str, Any]) -> Iterator[str]:
  """Expands `~` in the paths of `values`; yields a line for each mistake."""
  for key in _PATHS:
    *sections, name = key.split('.')
    section = values
    for part in sections:
      section = section.get(part)
      if not isinstance(section, dict):
        break
    else:
      # A plug-in may have an argument `file` that is not a path.
      is_path = 'type' not in section or section['type'] == 'BPE'
      if is_path and isinstance(section.get(name), str):
        try:
          section[name] = home.expand(section[name], key)
        except UserError as error:
          yield from error.problems


def _assign(section: dict[str, Any], key: str, value: Any) -> None:
  spec, _, name = key.rpartition('.')
  if name == 'type' and section.get('type') != value:
    # The other arguments belong to the old type.
    for other in [k for k in section if schema.spec_of(f'{spec}.{k}') == spec]:
      del section[other]
  section[name] = value


def _literal(text: str) -> Any:
  """Returns the JSON value that `text` spells, or `text` if it spells none."""
  words = {'true': True, 'false': False, 'null': None}
  if text in words:
    return words[text]
  try:
    value = ast.literal_eval(text)
    return json.loads(json.dumps(value, allow_nan=False))
  except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
    return text


def _parse(key: str, text: str) -> Any:
  """Returns the value of an override.

  Raises:
    ValueError, OverflowError: `text` is not of the key's type.
  """
  if key not in schema.FIELDS:  # The key is an argument or type of a spec.
    return text if key.endswith('.type') else _literal(text)
  kind = schema.FIELDS[key].kind
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise ValueError
    return text.lower() == 'true'
  return number(kind, text) if kind in (int, float) else kind(text)


def number(kind: type, text: str) -> int | float:
  """Returns the number that `text` spells.

  Only ASCII digits are allowed; Python would accept digits of other scripts.

  Args:
    kind: int or float.
    text: Number as given; an int may have an exponent, as in 1e4.

  Raises:
    ValueError, OverflowError: `text` is not a number of this kind.
  """
  if not text.isascii():
    raise ValueError(text)
  if kind is int:
    try:
      return int(text)
    except ValueError:
      number = float(text)  # 1e4 is an integer.
      if not number.is_integer():
        raise
      return int(number)
  return kind(text)
