"""Config specs -> objects: {'type': 'pkg.module.Name', **arguments}."""

from collections.abc import Callable, Mapping
import difflib
import importlib
import inspect
import math
from typing import Any

from trainers.errors import UserError


def did_you_mean(word: str, words) -> str:
  """' Did you mean ...?', or '' when nothing is close."""
  close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
  return f' Did you mean {close[0]!r}?' if close else ''


def resolve(where: str, name: str, table: Mapping[str, Any]) -> Any:
  """A bare name from `table`, a dotted one by import.

  Raises:
    UserError: naming `where`, when there is no such class or function.
  """
  if '.' not in name:
    found, place = table.get(name), 'NanoMoE'
    names = list(table)
  else:
    module_name, _, attribute = name.rpartition('.')
    try:
      module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError, TypeError) as error:
      raise UserError(f'{where}.type={name!r}: {error}') from error
    found, place = getattr(module, attribute, None), f'module {module_name}'
    names = [f'{module_name}.{key}' for key in vars(module)]
  if callable(found):
    return found
  own = f' ({", ".join(sorted(table))})' if table and '.' not in name else ''
  raise UserError(
    f'{where}.type={name!r}: {place}{own} has no such class or function; an '
    f'import path, my_module.Thing, is allowed.{did_you_mean(name, names)}'
  )


def build(
  where: str, spec: Mapping[str, Any], table: Mapping[str, Any], **context: Any
) -> Any:
  """Calls what `spec` names with its arguments, checked against its signature.

  Args:
    where: the config key of the spec, for messages.
    spec: `type`, and keyword arguments.
    table: what bare names mean.
    **context: what the owner hands to anything that takes it by name; a key
      of the spec wins.

  Raises:
    UserError: an unknown type, an unknown or a missing argument, or what
      the class itself refuses by a ValueError.
  """
  if not isinstance(spec.get('type'), str):
    raise UserError(f'{where}.type is missing: a name, or an import path')
  target: Callable[..., Any] = resolve(where, spec['type'], table)
  arguments = {k: v for k, v in spec.items() if k != 'type'}
  try:
    signature = inspect.signature(target)
  except ValueError as error:  # Of some builtins.
    raise UserError(f'{where}.type={spec["type"]!r}: {error}') from error
  shown = _shown(spec['type'], signature)
  names = list(signature.parameters)
  takes_any = any(
    p.kind is p.VAR_KEYWORD for p in signature.parameters.values()
  )
  problems = []
  if not takes_any:
    problems += [
      f'{where}.{key}: {shown} takes no argument {key!r}.'
      f'{did_you_mean(key, names)}'
      for key in arguments
      if key not in names
    ]
  hints = _annotations(target)
  problems += [
    f'{where}.{key}={value!r}: {shown} wants {hints[key]} there'
    for key, value in arguments.items()
    if key in hints and not _fits(value, hints[key])
  ]
  arguments = {
    **{k: v for k, v in context.items() if k in names},
    **arguments,
  }
  problems += [
    f'{where}.{name} is missing: {shown} needs it'
    for name, parameter in signature.parameters.items()
    if parameter.default is parameter.empty
    and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    and name not in arguments
  ]
  if problems:
    raise UserError(problems)
  try:
    return target(**arguments)
  except ValueError as error:
    raise UserError(f'{where}: {error}') from error


def _shown(name: str, signature: inspect.Signature) -> str:
  """'Name(argument, argument=default)'; Linen's own arguments left out."""
  parts = [
    str(p.replace(annotation=p.empty))
    for p in signature.parameters.values()
    if p.name not in ('parent', 'name')
  ]
  return f'{name}({", ".join(parts)})'


_SIMPLE = {'int': int, 'float': float, 'str': str, 'bool': bool, 'None': None}


def _annotations(target: Callable[..., Any]) -> dict[str, str]:
  """{parameter: 'int | None'}: those that are unions of simple types only."""
  hints = {}
  for name, parameter in inspect.signature(target).parameters.items():
    hint = parameter.annotation
    text = hint if isinstance(hint, str) else getattr(hint, '__name__', '')
    if not isinstance(hint, (str, type)):
      text = str(hint)  # A union.
    if text and all(part.strip() in _SIMPLE for part in text.split('|')):
      hints[name] = text
  return hints


def _fits(value: Any, hint: str) -> bool:
  kinds = [_SIMPLE[part.strip()] for part in hint.split('|')]
  if float in kinds and type(value) in (int, float):
    return math.isfinite(value)
  return value in kinds if value is None else type(value) in kinds
