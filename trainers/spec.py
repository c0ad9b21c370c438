"""Objects built from config specs, {'type': 'module.Name', **arguments}."""

from collections.abc import Callable, Mapping
import difflib
import importlib
import inspect
import os
import sys
import traceback
import types
import typing
from typing import Any

from trainers.errors import UserError


def did_you_mean(word: str, words) -> str:
  """Returns ' Did you mean ...?', or '' if no word is close.

  Args:
    word: Unknown word.
    words: Known words.
  """
  close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
  return f' Did you mean {close[0]!r}?' if close else ''


def raised(error: BaseException, file: str = '') -> str:
  """Returns one line with an error's class, message, file and line.

  Args:
    error: Error that was raised.
    file: File of the line, if the traceback passes through it; otherwise the
      innermost file is named.
  """
  message: Any = error
  while isinstance(message, BaseException) and message.args:
    message = message.args[0]  # ml_collections nests errors.
  text = f'{type(error).__name__}: {" ".join(str(message).split())}'
  frames = traceback.extract_tb(error.__traceback__)
  frames = [frame for frame in frames if frame.filename == file] or frames
  if isinstance(error, SyntaxError):
    name, line = error.filename or '', error.lineno
  else:
    name, line = frames[-1].filename, frames[-1].lineno
  return f'{text} ({os.path.basename(name)}, line {line})'


def resolve(where: str, name: str, table: Mapping[str, Any]) -> Any:
  """Returns the class or function that a name refers to.

  Args:
    where: Config key of the spec, for messages.
    name: Name in `table`, or an import path with a dot.
    table: Classes and functions by name.

  Raises:
    UserError: There is no such class or function, or its import fails.
  """
  if '.' not in name:
    found, place = table.get(name), 'NanoMoE'
    names = list(table)
  else:
    module_name, _, attribute = name.rpartition('.')
    try:
      module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
      raise UserError(f'{where}.type={name!r}: {error}') from error
    except (Exception, SystemExit) as error:  # A plug-in may raise anything.
      raise UserError(f'{where}.type={name!r}: {raised(error)}') from error
    found, place = getattr(module, attribute, None), f'module {module_name}'
    names = [f'{module_name}.{key}' for key in vars(module)]
  if callable(found):
    return found
  own = f' ({", ".join(sorted(table))})' if table and '.' not in name else ''
  raise UserError(
    f'{where}.type={name!r}: {place}{own} has no such class or function; an '
    f'import path such as my_module.Thing is allowed.'
    f'{did_you_mean(name, names)}'
  )


def build(
  where: str, spec: Mapping[str, Any], table: Mapping[str, Any], **context: Any
) -> Any:
  """Builds an object of a spec, after checking arguments by the signature.

  Args:
    where: Config key of the spec, for messages.
    spec: Mapping with `type` and keyword arguments.
    table: Classes and functions by name.
    **context: Further arguments, which are passed if the signature has them.
      Arguments in `spec` take precedence.

  Returns:
    The object.

  Raises:
    UserError: The type is unknown, an argument is unknown, missing or of a
      wrong type, or the class raises a ValueError.
  """
  if not isinstance(spec.get('type'), str):
    raise UserError(
      f'{where}.type is missing; a name or an import path is allowed'
    )
  target: Callable[..., Any] = resolve(where, spec['type'], table)
  arguments = {k: v for k, v in spec.items() if k != 'type'}
  try:
    signature = inspect.signature(target)
  except ValueError as error:  # Some builtins have no signature.
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
  hints = _hints(target)
  problems += [
    f'{where}.{key}={_cut(value)}: not of type {_name_of(hints[key])}; the '
    f'signature is {shown}'
    for key, value in arguments.items()
    if key in hints and not _fits(value, hints[key])
  ]
  arguments = {
    **{k: v for k, v in context.items() if k in names},
    **{k: _of_type(v, hints.get(k)) for k, v in arguments.items()},
  }
  problems += [
    f'{where}.{name} is missing: {shown} requires it'
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


def build_group(
  group: str,
  specs: Mapping[str, Mapping[str, Any]],
  table: Mapping[str, Any],
  kinds: tuple[type, ...],
  **context: Any,
) -> list[Any]:
  """Builds an object of each spec, in their order.

  Args:
    group: Config key of the group, for messages.
    specs: Specs by name.
    table: Classes and functions by name.
    kinds: Allowed classes of the objects.
    **context: Further arguments, as in `build`.

  Returns:
    The objects.

  Raises:
    UserError: A spec is wrong, as in `build`, or an object is not of `kinds`.
  """
  built = []
  for name, own in specs.items():
    plugin = build(f'{group}.{name}', own, table, **context)
    if not isinstance(plugin, kinds):
      wanted = ' or '.join(kind.__name__ for kind in kinds)
      raise UserError(
        f'{group}.{name}.type={own["type"]!r}: builds a '
        f'{type(plugin).__name__}; it must build a {wanted}'
      )
    built.append(plugin)
  return built


def _cut(value: Any) -> str:
  """Returns the repr of `value`, shortened if it is long."""
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'


def _shown(name: str, signature: inspect.Signature) -> str:
  """Returns 'Name(argument, argument=default)', without Linen's arguments."""
  parts = [
    str(p.replace(annotation=p.empty))
    for p in signature.parameters.values()
    if p.name not in ('parent', 'name')
  ]
  return f'{name}({", ".join(parts)})'


_SIMPLE = {'int': int, 'float': float, 'str': str, 'bool': bool, 'None': None}


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
  """Returns {parameter: annotation}."""
  try:
    signature = inspect.signature(target, eval_str=True)
  except Exception:  # An annotation may name imports of type checking alone.
    signature = inspect.signature(target)
  return {
    name: _evaluated(parameter.annotation)
    for name, parameter in signature.parameters.items()
  }


def _evaluated(hint: Any) -> Any:
  """Returns the type of text such as 'int | None'; other hints unchanged."""
  parts = hint.split('|') if isinstance(hint, str) else ['']
  kinds = [_SIMPLE.get(part.strip(), Any) for part in parts]
  return hint if Any in kinds else typing.Union[tuple(kinds)]  # noqa: UP007


def _name_of(hint: Any) -> str:
  return getattr(hint, '__name__', '') if type(hint) is type else str(hint)


def _arms(hint: Any) -> tuple[Any, ...]:
  """Returns the types of a union, or the only type."""
  union = typing.get_origin(hint) in (typing.Union, types.UnionType)
  return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
  """Returns whether `value` fits `hint`. Complex hints are not checked."""
  return any(_fits_one(value, arm) for arm in _arms(hint))


def _fits_one(value: Any, hint: Any) -> bool:
  origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
  if origin is float:
    # math.isfinite raises for integers above all floats. NaN is not <= either.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
  if origin in (bool, int, str, types.NoneType):
    return type(value) is origin
  if origin is None:
    return value is None
  if origin not in (tuple, list):
    return True
  if not isinstance(value, (tuple, list)):
    return False
  if origin is tuple and parts and parts[-1] is not ...:
    return len(value) == len(parts) and all(map(_fits, value, parts))
  return not parts or all(_fits(x, parts[0]) for x in value)


def _of_type(value: Any, hint: Any) -> Any:
  """Returns `value`, with a list as a tuple if `hint` is a tuple.

  JSON has no tuples.
  """
  hint = next((arm for arm in _arms(hint) if _fits_one(value, arm)), hint)
  is_tuple = tuple in (hint, typing.get_origin(hint))
  return tuple(value) if is_tuple and isinstance(value, list) else value
