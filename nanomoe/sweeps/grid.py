"""Values of --over, and the grid of all their combinations."""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import math
import re
from typing import Any, NamedTuple

from nanomoe.config import schema
from nanomoe.config.overrides import MAX_JOBS, from_values, number
from trainers.errors import UserError

_NUMBER = r'[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?'
_FORM = (
  'it must be --over=KEY=VALUE,VALUE or --over=KEY=FIRST..LAST, such as '
  '--over=seed=0..2'
)

Assignment = dict[str, str]  # The text of a value, by key.


class Range(NamedTuple):
  """Range of numbers, which includes both ends.

  Attributes:
    first, last: Ends, as given.
  """

  first: str
  last: str

  def __str__(self) -> str:
    return f'{self.first}..{self.last}'


class Axis(NamedTuple):
  """Config key of a sweep, with its values.

  Attributes:
    key: Dotted config key.
    items: Values as given, and ranges.
  """

  key: str
  items: tuple[str | Range, ...]

  def values(self) -> list[str]:
    """Returns all values, with each range of integers expanded.

    Raises:
      UserError: A range is not one of integers, or is too long.
    """
    found = []
    for item in self.items:
      if isinstance(item, Range):
        found += map(str, self._integers(item))
      else:
        found.append(item)
    return found

  def _integers(self, item: Range) -> range:
    where = f'--over={self.key}={item}'
    try:
      first, last = number(int, item.first), number(int, item.last)
    except (ValueError, OverflowError) as error:
      raise UserError(
        f'{where}: a grid has ranges of integers only; list the values, or '
        'give the range alone with --search=random'
      ) from error
    if last - first >= MAX_JOBS:
      raise UserError(f'{where}: the range has over {MAX_JOBS} values')
    return range(int(first), int(last) + 1)


def parse(texts: Iterable[str]) -> list[Axis]:
  """Returns the axes that values of --over describe.

  Args:
    texts: Values of the form `KEY=VALUE,VALUE` or `KEY=FIRST..LAST`. A comma
      within brackets or quotes belongs to a value.

  Raises:
    UserError: A line for each mistake.
  """
  axes, lines = [], []
  for text in texts:
    key, equals, values = text.partition('=')
    if not key or not equals:
      lines.append(f'--over={text}: the values are missing; {_FORM}')
      continue
    parts, is_closed = _split(values)
    if not is_closed:
      lines.append(f'--over={text}: a quote or a bracket is not closed')
    if '' in parts and len(parts) > 1:
      lines.append(f'--over={text}: a value is empty; {_FORM}')
    items = [_item(key, part) for part in parts]
    for item in items:
      if isinstance(item, Range) and float(item.first) > float(item.last):
        lines.append(f'--over={text}: {item} is empty; the first end is larger')
    if any(axis.key == key for axis in axes):
      lines.append(f'--over={text}: the key is given twice; give --over once')
    axes.append(Axis(key, tuple(items)))
  if lines:
    raise UserError(lines)
  return axes


def from_mapping(over: Mapping[str, str | Sequence[Any]]) -> list[Axis]:
  """Returns the axes of {key: values}.

  Args:
    over: Values of each key: a sequence, or text as in --over.

  Raises:
    UserError: A line for each mistake.
  """
  axes = []
  for key, values in over.items():
    if isinstance(values, str):
      axes += parse([f'{key}={values}'])
    elif not values:
      raise UserError(f'{key}={values!r}: there is no value; give one or more')
    else:
      axes.append(Axis(key, tuple(text_of(key, value) for value in values)))
  return axes


def expand(
  axes: Sequence[Axis], given: Sequence[Assignment]
) -> list[Assignment]:
  """Returns all combinations, the last axis varying fastest.

  Args:
    axes: Keys with values.
    given: Assignments of a sweep(), each of which has the whole grid; [] if
      there is none.

  Raises:
    UserError: There are too many combinations, or a key is in an axis and in
      an assignment.
  """
  axes_values = [axis.values() for axis in axes]
  size = math.prod(map(len, axes_values)) * max(len(given), 1)
  if size > MAX_JOBS:
    raise UserError(
      f'--over: the grid has {size} jobs; it must have at most {MAX_JOBS}'
    )
  keys = [axis.key for axis in axes]
  if both := sorted({key for item in given for key in item} & set(keys)):
    raise UserError(f'--over={both[0]}: sweep() of the config sets it as well')
  return [
    {**start, **dict(zip(keys, values, strict=True))}
    for start in (given or [{}])
    for values in itertools.product(*axes_values)
  ]


def text_of(key: str, value: Any) -> str:
  """Returns a value of `key` as --config.KEY=VALUE has it.

  Raises:
    UserError: The value is None, which no key allows, or a dict.
  """
  if value is None or isinstance(value, Mapping):
    raise UserError(f'{key}={value!r}: it must be a number, a text or a list')
  ((_, text),) = from_values({key: value})
  return text


def check_keys(
  keys: Iterable[str], overrides: Iterable[tuple[str, str]]
) -> None:
  """Raises an error if --over and --config.KEY set the same key.

  Raises:
    UserError: A line for each such key.
  """
  both = {key: value for key, value in overrides if key in {*keys}}
  if both:
    raise UserError(
      [
        f'--config.{key}={value}: the sweep sets it too; give it once'
        for key, value in both.items()
      ]
    )


def _item(key: str, text: str) -> str | Range:
  match = re.fullmatch(rf'({_NUMBER})\.\.({_NUMBER})', text)
  if match:
    return Range(*match.groups())
  field = schema.FIELDS.get(key)
  is_quoted = len(text) > 1 and text[0] in '\'"' and text[-1] == text[0]
  # The quotes of an argument are Python's, and belong to its value.
  return text[1:-1] if field and field.kind is str and is_quoted else text


def _split(text: str) -> tuple[list[str], bool]:
  """Splits at commas outside of brackets and quotes.

  Returns:
    The parts, and whether all brackets and quotes are closed.
  """
  parts, depth, quote = [''], 0, ''
  for char in text:
    if quote:
      quote = '' if char == quote else quote
    elif char in '\'"':
      quote = char
    else:
      depth += (char in '([{') - (char in ')]}')
    if char == ',' and not quote and depth <= 0:
      parts.append('')
    else:
      parts[-1] += char
  return parts, not quote and depth <= 0
