"""Config specs -> objects: {'type': 'pkg.module.Name', **arguments}."""

from collections.abc import Callable, Mapping
import difflib
import importlib
import inspect
from typing import Any

from trainers.errors import UserError


def did_you_mean(word: str, words) -> str:
  """' Did you mean ...?', or '' when nothing is close."""
  close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
  return f' Did you mean {close[0]!r}?' if close else ''


def resolve(where: str, name: str, table: Mapping[str, Any]) -> Any:
  """A bare name from `table`, a dotted one by import.

  Raises:
    UserError: naming `where`, when there is no such thing.
  """
  if '.' not in name:
    if name in table:
      return table[name]
    raise UserError(
      f'{where}.type={name!r} is unknown; it is one of '
      f'{", ".join(sorted(table))}, or an import path such as '
      f'my_module.Thing.{did_you_mean(name, table)}'
    )
  module_name, _, attribute = name.rpartition('.')
  try:
    return getattr(importlib.import_module(module_name), attribute)
  except ImportError as e:
    raise UserError(f'{where}.type={name!r}: {e}') from e
  except AttributeError:
    module = importlib.import_module(module_name)
    raise UserError(
      f'{where}.type={name!r}: module {module_name} has no {attribute!r}.'
      f'{did_you_mean(attribute, vars(module))}'
    ) from None


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
    UserError: an unknown type, an unknown or a missing argument.
  """
  target: Callable[..., Any] = resolve(where, spec['type'], table)
  arguments = {k: v for k, v in spec.items() if k != 'type'}
  signature = inspect.signature(target)
  names = [n for n in signature.parameters if n not in ('name', 'parent')]
  takes_any = any(
    p.kind is p.VAR_KEYWORD for p in signature.parameters.values()
  )
  problems = []
  if not takes_any:
    problems += [
      f'{where}.{key}: {spec["type"]} takes no argument {key!r}; '
      f'it takes {", ".join(names)}.{did_you_mean(key, names)}'
      for key in arguments
      if key not in names
    ]
  arguments = {
    **{k: v for k, v in context.items() if k in names},
    **arguments,
  }
  problems += [
    f'{where}.{name}: {spec["type"]} needs it; its signature is '
    f'{spec["type"]}({", ".join(names)})'
    for name, parameter in signature.parameters.items()
    if parameter.default is parameter.empty
    and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    and name not in arguments
  ]
  if problems:
    raise UserError(problems)
  return target(**arguments)
