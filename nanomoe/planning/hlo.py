"""Reader of XLA's text of a compiled program."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple


class Op(NamedTuple):
  """Instruction that runs by itself.

  Attributes:
    source: Traced operation that the instruction is named for, by module and
      transform; that of an operand where XLA gave it no name.
    flops: Floating-point operations of its products, 2 * multiply-adds.
    bytes: Bytes of its operands and results.
    code: Name of the instruction in HLO: fusion, while, copy, ...
  """

  source: str
  flops: int
  bytes: int
  code: str


class Line(NamedTuple):
  """Line of a computation.

  Attributes:
    name: Name of the result.
    type: Type of the result, a tuple in parentheses.
    code: Name of the instruction in HLO.
    rest: Operands, attributes and metadata.
  """

  name: str
  type: str
  code: str
  rest: str


_COMPUTATION = re.compile(
  r'^(ENTRY )?%?(\S+) \(.*?\{\n(.*?)^\}', re.MULTILINE | re.DOTALL
)
_LINE = re.compile(
  r'^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$', re.MULTILINE
)
_SHAPE = re.compile(r'(pred|[a-z]+\d+)\[([\d,]*)\]')


class Computations(NamedTuple):
  """Computations of a program.

  Attributes:
    entry: Name of the computation that runs first.
    lines: Lines by name, by the name of their computation.
  """

  entry: str
  lines: dict[str, dict[str, Line]]


def read(text: str) -> Computations:
  """Returns the computations of a compiled program."""
  found = _COMPUTATION.findall(text)
  return Computations(
    entry=next(name for mark, name, _ in found if mark),
    lines={
      name: {line.name: line for line in _lines(body)}
      for _, name, body in found
    },
  )


def parse(text: str) -> dict[str, Op]:
  """Returns operations by name, those inside fusions joined to the fusion."""
  computations = read(text).lines
  ops = {}
  for lines in computations.values():
    for line in lines.values():
      called = re.search(r'calls=%(\S+?)[,\s]', line.rest + ' ')
      inner = computations[called[1]] if called else {line.name: line}
      named = re.search(r'op_name="(.*?)"', line.rest)
      of_operands = (ops[x].source for x in _operands(line) if x in ops)
      source = named[1] if named else next(filter(None, of_operands), '')
      scope = inner if called else lines
      ops[line.name] = Op(
        source=source,
        flops=sum(_flops(x, scope) for x in inner.values()),
        bytes=num_bytes(line.type)
        + sum(num_bytes(lines[x].type) for x in _operands(line) if x in lines),
        code=line.code,
      )
  return ops


def _lines(body: str) -> Iterator[Line]:
  for match in _LINE.finditer(body):
    yield Line(*match.groups())


def _operands(line: Line) -> list[str]:
  return re.findall(r'%([\w.\-]+)', line.rest.partition(')')[0])


def _dimensions(shape: str) -> list[int]:
  return [int(n) for n in shape.split(',') if n]


def num_bytes(type_: str) -> int:
  """Returns the bytes of a type, of all parts of a tuple."""
  return sum(
    math.prod(_dimensions(shape))
    * (1 if name == 'pred' else int(re.sub(r'\D', '', name)) // 8)
    for name, shape in _SHAPE.findall(type_)
  )


def _flops(line: Line, scope: dict[str, Line]) -> int:
  if line.code != 'dot':
    return 0
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.rest)
  left = _SHAPE.search(scope[_operands(line)[0]].type)
  out = _SHAPE.search(line.type)
  assert contracted and left and out, line
  sizes = _dimensions(left[2])
  depth = math.prod(sizes[i] for i in _dimensions(contracted[1]))
  return 2 * depth * math.prod(_dimensions(out[2]))
