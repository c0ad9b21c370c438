"""What XLA's text of a compiled program says of its operations."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple


class Op(NamedTuple):
  """An instruction that runs by itself.

  Attributes:
    source: the traced operation that it is named for, by module and transform;
      that of an operand where XLA gave it no name.
    flops: 2 * multiply-adds of the products in it.
    bytes: of its operands and results.
    code: its name in HLO: fusion, while, copy, ...
  """

  source: str
  flops: int
  bytes: int
  code: str


class _Line(NamedTuple):
  name: str
  type: str
  code: str
  rest: str


_COMPUTATION = re.compile(
  r'^(?:ENTRY )?%?(\S+) \(.*?\{\n(.*?)^\}', re.MULTILINE | re.DOTALL
)
_LINE = re.compile(
  r'^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$', re.MULTILINE
)
_SHAPE = re.compile(r'(pred|[a-z]+\d+)\[([\d,]*)\]')


def parse(text: str) -> dict[str, Op]:
  """Operations by name, those inside fusions joined to the fusion."""
  computations = {
    name: {line.name: line for line in _lines(body)}
    for name, body in _COMPUTATION.findall(text)
  }
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
        bytes=_bytes(line.type)
        + sum(_bytes(lines[x].type) for x in _operands(line) if x in lines),
        code=line.code,
      )
  return ops


def _lines(body: str) -> Iterator[_Line]:
  for match in _LINE.finditer(body):
    yield _Line(*match.groups())


def _operands(line: _Line) -> list[str]:
  return re.findall(r'%([\w.\-]+)', line.rest.partition(')')[0])


def _dimensions(shape: str) -> list[int]:
  return [int(n) for n in shape.split(',') if n]


def _bytes(type_: str) -> int:
  return sum(
    math.prod(_dimensions(shape))
    * (1 if name == 'pred' else int(re.sub(r'\D', '', name)) // 8)
    for name, shape in _SHAPE.findall(type_)
  )


def _flops(line: _Line, scope: dict[str, _Line]) -> int:
  if line.code != 'dot':
    return 0
  contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.rest)
  left = _SHAPE.search(scope[_operands(line)[0]].type)
  out = _SHAPE.search(line.type)
  assert contracted and left and out, line
  sizes = _dimensions(left[2])
  depth = math.prod(sizes[i] for i in _dimensions(contracted[1]))
  return 2 * depth * math.prod(_dimensions(out[2]))
