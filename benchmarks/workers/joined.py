"""python -m benchmarks.workers.joined PLACE CHANGES

Times steps of base.py in one of several processes. PLACE is JSON, the address
of the coordinator, the number of processes and the id of this one; or null.
CHANGES is JSON, values of config keys.
"""

import json
import sys

from benchmarks.workers.serve import serve
from nanomoe.run import cluster, launchers


def main(place: list | None, changes: dict[str, str]) -> None:
  """Answers until standard input ends.

  Args:
    place: Address, number of processes and id; None without others.
    changes: Values of config keys.
  """
  if place:
    cluster.connect(launchers.Cluster(*place, source='flags'), 300)
  # Nothing may use JAX before it is connected.
  from benchmarks import parity  # noqa: PLC0415
  from benchmarks.variant import Variant  # noqa: PLC0415

  made: list[Variant] = []

  def variant() -> Variant:
    if not made:
      made.append(Variant(changes))
      made[0].compile()
    return made[0]

  def step():
    variant()
    return lambda n: [variant()() for _ in range(n)]

  def collectives():
    return lambda _: parity.collectives(variant().jitted.as_text())

  serve({'step': step, 'collectives': collectives})


if __name__ == '__main__':
  main(*map(json.loads, sys.argv[1:]))
