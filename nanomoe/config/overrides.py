"""From the command line to a whole, checked config.

Overrides are parsed here and not by ml_collections' flags: all mistakes are
told at once, a line each, and a spec's own arguments can be given too.
"""

import ast
from collections.abc import Iterator
import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import sys
import types
from typing import Any

from ml_collections import ConfigDict, config_dict

import nanomoe
from nanomoe.config import home, older, schema, validation
from nanomoe.config.schema import Config
from trainers import spec as spec_lib
from trainers.errors import UserError

Override = tuple[str, str]  # key, value: both as given


def split_arguments(argv: list[str]) -> tuple[list[str], list[Override]]:
  """argv without its --config.key=value, and those.

  `--config.key value` is understood too.
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
      raise UserError(f'--config.{key} needs a value: --config.{key}=VALUE')
    overrides.append((key, value))
  return rest, overrides


def load_file(path: str) -> Config:
  """Returns the config that get_config() of a Python file returns.

  Args:
    path: Path of the file. `FILE.py:ARGUMENT` calls get_config('ARGUMENT'), as
      ml_collections does.

  Raises:
    UserError: There is no such file, or it is no config, or its get_config()
      takes no argument.
  """
  name, argument = _split_argument(path)
  try:
    file = pathlib.Path(home.expand(name, '--config'))
    if not file.exists():  # Ours, from wherever they are asked for.
      ours = pathlib.Path(__file__).parents[2] / name
      file = ours if ours.is_file() else file
    is_file = file.is_file()
  except OSError as error:  # A name that is too long, for example.
    raise UserError(f'--config={path}: {error.strerror}') from error
  if not is_file:
    near = sorted(str(p) for p in file.parent.glob('*.py'))
    near = [p for p in near if not p.endswith('__init__.py')]
    hint = f'; there are {", ".join(near[:8])}' if near else ''
    raise UserError(f'--config={path}: no such file{hint}')
  file = file.absolute()  # As it is in the frames of a traceback.
  # A name of its own: a file random.py must not replace the module random.
  name = f'config_file_{re.sub(r"[^a-zA-Z0-9]", "_", file.stem)}'
  spec = importlib.util.spec_from_file_location(name, file)
  if spec is None or spec.loader is None:
    raise UserError(f'--config={path}: it must be a Python file, name.py')
  module = importlib.util.module_from_spec(spec)
  try:
    with _importable(name, module, file.parent):
      spec.loader.exec_module(module)
      if not hasattr(module, 'get_config'):
        raise UserError(f'--config={path}: it has no function get_config()')
      config = module.get_config(*_arguments(path, module, argument))
      if not isinstance(config, ConfigDict):
        raise UserError(
          f'--config={path}: get_config() must return a ConfigDict'
        )
      return schema.make(older.rename(_plain(config)))
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # Whatever somebody's file does.
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

  Dataclasses and typing look the module of a class up in sys.modules, some
  of them long after the file was read: a module without an error stays there.
  """
  # A user's own package of this name stays if the program has imported it.
  if 'configs' not in sys.modules:
    nanomoe.import_own('configs')
  sys.modules[name] = module
  before = list(sys.path)
  # Last: files beside a config file hide nothing that is installed.
  sys.path.append(str(directory))
  try:
    yield
  except BaseException:
    sys.modules.pop(name, None)
    raise
  finally:
    if sys.path == [*before, str(directory)]:  # Else the file changed it.
      sys.path.pop()


def _plain(value: Any) -> Any:
  """Values in place of references, and as JSON will give them back.

  None for one that is required and not there: it is no value of any key, so an
  override gives one, or it is told.
  """
  if isinstance(value, config_dict.FieldReference):
    try:
      value = value.get()
    except config_dict.RequiredValueError:
      return None
  if isinstance(value, ConfigDict):
    items = value.iteritems(preserve_field_references=True)
    return {k: _plain(v) for k, v in items}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


def apply(config: Config, overrides: list[Override]) -> Config:
  """A checked copy of `config` with `overrides`; the last of a key holds.

  Raises:
    UserError: everything that is wrong, with the config and the overrides.
  """
  values = config.to_dict()
  lines = []
  # Types first: another type comes with arguments of its own.
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
        break  # A value where a section belongs: told below.
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
    section[name] = field.kind(section[name])  # 1 is a number too.
  for section, name in ((values['data'], 'path'), (values, 'init_from')):
    try:
      section[name] = section[name] and os.path.abspath(section[name])
    except FileNotFoundError as error:
      raise UserError(
        f'{name}={section[name]!r}: the current directory does not exist'
      ) from error
  return schema.make(values)


# Paths of files of the user. That of a tokenizer, if BPE has it.
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
      # What another tokenizer's argument of this name means is its own affair.
      is_ours = 'type' not in section or section['type'] == 'BPE'
      if is_ours and isinstance(section.get(name), str):
        try:
          section[name] = home.expand(section[name], key)
        except UserError as error:
          yield from error.problems


def _assign(section: dict[str, Any], key: str, value: Any) -> None:
  spec, _, name = key.rpartition('.')
  if name == 'type' and section.get('type') != value:
    # The arguments were those of another type.
    for other in [k for k in section if schema.spec_of(f'{spec}.{k}') == spec]:
      del section[other]
  section[name] = value


def _literal(text: str) -> Any:
  """A number, list, word or quoted text that JSON can hold; else the text."""
  words = {'true': True, 'false': False, 'null': None}
  if text in words:
    return words[text]
  try:
    value = ast.literal_eval(text)
    return json.loads(json.dumps(value, allow_nan=False))
  except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
    return text


def _parse(key: str, text: str) -> Any:
  """Raises ValueError if `text` is not of the key's type."""
  if key not in schema.FIELDS:  # Of a spec.
    return text if key.endswith('.type') else _literal(text)
  kind = schema.FIELDS[key].kind
  if kind is bool:
    if text.lower() not in ('true', 'false'):
      raise ValueError
    return text.lower() == 'true'
  return number(kind, text) if kind in (int, float) else kind(text)


def number(kind: type, text: str) -> int | float:
  """Returns the number that `text` spells.

  Digits are those of ASCII: Python reads those of other scripts too.

  Raises:
    ValueError, OverflowError: it is not a number of this kind.
  """
  if not text.isascii():
    raise ValueError(text)
  if kind is int:
    try:
      return int(text)
    except ValueError:
      number = float(text)  # 1e4 is an integer too.
      if not number.is_integer():
        raise
      return int(number)
  return kind(text)
