"""From the command line to a whole, checked config.

Overrides are parsed here and not by ml_collections' flags: all mistakes are
told at once, a line each, and a spec's own arguments can be given too.
"""

import ast
import importlib.util
import json
import os
import pathlib
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from nanomoe.config import schema
from trainers import spec as spec_lib
from trainers.errors import UserError

# A ConfigDict, whose attributes have no static types.
Config = Any

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


def load_file(path: str) -> ConfigDict:
  """What get_config() of a Python file returns.

  Raises:
    UserError: there is no such file, or it is no config.
  """
  file = pathlib.Path(path)
  try:
    if not file.exists():  # Ours, from wherever they are asked for.
      ours = pathlib.Path(__file__).parents[2] / path
      file = ours if ours.is_file() else file
    is_file = file.is_file()
  except OSError as error:  # A name that is too long, for example.
    raise UserError(f'--config={path}: {error.strerror}') from error
  if not is_file:
    near = sorted(str(p) for p in file.parent.glob('*.py'))
    near = [p for p in near if not p.endswith('__init__.py')]
    hint = f'; there are {", ".join(near[:8])}' if near else ''
    raise UserError(f'--config={path}: no such file{hint}')
  spec = importlib.util.spec_from_file_location(file.stem, file)
  if spec is None or spec.loader is None:
    raise UserError(f'--config={path}: it must be a Python file, name.py')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(f'--config={path}: it has no function get_config()')
    config = module.get_config()
    if not isinstance(config, ConfigDict):
      raise UserError(f'--config={path}: get_config() must return a ConfigDict')
    return ConfigDict(_plain(config))
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # Whatever somebody's file does.
    where = spec_lib.raised(error, str(file))
    raise UserError(f'--config={path}: {where}') from error


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


def apply(config: ConfigDict, overrides: list[Override]) -> ConfigDict:
  """A checked copy of `config` with `overrides`; the last of a key holds.

  Raises:
    UserError: everything that is wrong, with the config and the overrides.
  """
  values = schema.with_current_values(config.to_dict())
  lines = []
  # Types first: another type comes with arguments of its own.
  for key, text in sorted(overrides, key=lambda o: not o[0].endswith('.type')):
    if not schema.known(key):
      lines.append(schema.unknown(key))
      continue
    try:
      value = schema.current_value(key, _parse(key, text))
    except (ValueError, OverflowError):
      field = schema.FIELDS[key]
      lines.append(
        f'config.{key}={schema.shown(text)}: it must be {field.allowed}'
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
  lines += schema.problems(values)
  if lines:
    raise UserError(lines)
  for key, field in schema.FIELDS.items():
    *sections, name = key.split('.')
    section = values
    for part in sections:
      section = section[part]
    section[name] = field.kind(section[name])  # 1 is a number too.
  for section, name in ((values['data'], 'path'), (values, 'init_from')):
    section[name] = section[name] and os.path.abspath(section[name])
  return ConfigDict(values)


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
  if kind is int:
    try:
      return int(text)
    except ValueError:
      number = float(text)  # 1e4 is an integer too.
      if not number.is_integer():
        raise
      return int(number)
  return kind(text)
