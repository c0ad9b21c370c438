"""Traffic between devices in one run of a compiled program."""

import math
import re
from typing import Any, NamedTuple

from nanomoe.planning import hlo

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_CALLED = re.compile(
  r'(?:calls|body|to_apply|true_computation|false_computation)=%([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{(.*?)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]')
# Axes of a mesh that form a group. A part of an axis has its size behind it.
_NAMED = re.compile(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")


class Traffic(NamedTuple):
  """Collectives of one kind, in one run of a program.

  Attributes:
    count: Number of collectives that a device takes part in.
    result_bytes: Bytes of their results on a device.
    received_bytes: Bytes that a device receives if the algorithms are rings.
  """

  count: float
  result_bytes: float
  received_bytes: float

  def plus(self, other: 'Traffic', times: float | int = 1) -> 'Traffic':
    """Returns self + times * other."""
    return Traffic(*(a + times * b for a, b in zip(self, other, strict=True)))


NONE = Traffic(0, 0, 0)


class Collectives(NamedTuple):
  """Collectives of one run of a program.

  Attributes:
    kinds: Traffic by kind; kinds without collectives are missing.
    open_loops: Number of loops of unknown length that hold collectives, of
      which no iteration is counted.
  """

  kinds: dict[str, Traffic]
  open_loops: int


def count(text: str) -> Collectives:
  """Returns the collectives of a compiled program.

  The body of a loop counts as often as XLA says that the loop runs. A loop of
  unknown length, such as that over the further rounds of `all_to_all`, counts
  as not run: with balanced loads it does not. All branches of a conditional
  count.

  Args:
    text: HLO of the program after its partition, as of `Compiled.as_text`.
  """
  program = hlo.read(text)
  done: dict[str, dict[str, Traffic]] = {}
  opened: set[str] = set()

  def visit(name: str) -> dict[str, Traffic]:
    if name in done:
      return done[name]
    done[name] = found = {}
    for line in program.lines.get(name, {}).values():
      kind = line.code.removesuffix('-start')
      if kind in KINDS:
        found[kind] = found.get(kind, NONE).plus(_traffic(kind, line))
        continue
      for called in _called(line):
        inner = visit(called)
        if not inner:
          continue
        times = 1
        if line.code == 'while':
          trips = _TRIPS.search(line.rest)
          if trips is None:
            opened.add(called)
            continue
          times = int(trips[1])
        for kind, traffic in inner.items():
          found[kind] = found.get(kind, NONE).plus(traffic, times)
    return found

  return Collectives(dict(visit(program.entry)), len(opened))


def _called(line: hlo.Line) -> list[str]:
  """Returns the computations that a line runs, but not the sum of a reduce."""
  if 'reduce' in line.code or line.code in ('scatter', 'sort', 'map'):
    return []
  names = _CALLED.findall(line.rest)
  if branches := _BRANCHES.search(line.rest):
    names += re.findall(r'%([\w.\-]+)', branches[1])
  return names


def _traffic(kind: str, line: hlo.Line) -> Traffic:
  size, parts = hlo.num_bytes(line.type), _group_size(line)
  if line.code.endswith('-start') and kind == 'all-gather':
    size = size * parts // (parts + 1)  # The type holds the operand, too.
  share = (parts - 1) / parts
  received = {
    'all-gather': share * size,
    'all-reduce': 2 * share * size,
    'reduce-scatter': (parts - 1) * size,
    'all-to-all': share * size,
    'collective-permute': size,
  }
  return Traffic(1, size, received[kind])


def _group_size(line: hlo.Line) -> int:
  """Returns the number of devices that take part together.

  Raises:
    ValueError: XLA writes the groups in a way that is not known.
  """
  if listed := _LISTED.search(line.rest):
    return max(len(listed[1].split(',')), 1)
  if iota := _IOTA.search(line.rest):
    return int(iota[2])
  if named := _NAMED.search(line.rest):
    sizes = {name: size for name, size, _ in _AXIS.findall(named[1])}
    return math.prod(
      int(part or sizes[name]) for name, _, part in _AXIS.findall(named[2])
    )
  if 'source_target_pairs' in line.rest:
    return 2
  raise ValueError(f'unknown replica groups: {line.rest[:500]}')


def extrapolate(
  first: Collectives, second: Collectives, steps: float | int
) -> Collectives:
  """Returns first + steps * (second - first), which grows with the layers.

  Args:
    first: Collectives of the program with fewer layers.
    second: Collectives of the program with more layers.
    steps: Layers to add, over the difference of the two.
  """
  names = {**first.kinds, **second.kinds}
  kinds = {}
  for name in names:
    a, b = first.kinds.get(name, NONE), second.kinds.get(name, NONE)
    kinds[name] = a.plus(b.plus(a, -1), steps)
  loops = first.open_loops + steps * (second.open_loops - first.open_loops)
  return Collectives(kinds, math.ceil(loops))


def from_json(value: Any) -> Collectives:
  """Returns the collectives that `Collectives` became in JSON."""
  kinds, open_loops = value
  return Collectives({k: Traffic(*v) for k, v in kinds.items()}, open_loops)
