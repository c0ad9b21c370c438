"""Conversion of parameters between stacked and unrolled blocks.

Unrolled blocks are `block_0`, `block_1`, .... Stacked blocks are those of one
period, `blocks/block_0` to `blocks/block_{period - 1}`, whose arrays have a
leading axis of periods. Blocks before the first period stay unrolled.
"""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp

# First name in the path of a stacked parameter.
STACKED = 'blocks'


def is_stacked(path: str) -> bool:
  """Returns whether the first axis of a parameter is that of periods.

  Args:
    path: Names from the root to the parameter, joined by '/'.
  """
  return path.startswith(f'{STACKED}/')


def stack(
  params: Mapping[str, Any], num_unrolled: int, period: int
) -> dict[str, Any]:
  """Returns the parameters of unrolled blocks, with stacked blocks.

  Args:
    params: Parameters with `block_i` for every block.
    num_unrolled: Number of blocks before the first period.
    period: Number of blocks in a period.
  """
  num_layers = sum(bool(re.fullmatch(r'block_\d+', name)) for name in params)
  moved = range(num_unrolled, num_layers)
  rest = {k: v for k, v in params.items() if k not in map(block_name, moved)}
  stacked = {
    block_name(i): jax.tree.map(
      lambda *x: jnp.stack(x),
      *(params[block_name(j)] for j in moved[i::period]),
    )
    for i in range(period)
  }
  return {**rest, STACKED: stacked}


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the parameters of stacked blocks, with unrolled blocks.

  Args:
    params: Parameters with `blocks`.
  """
  unrolled = {k: v for k, v in params.items() if k != STACKED}
  blocks = params[STACKED]
  first = sum(bool(re.fullmatch(r'block_\d+', name)) for name in unrolled)
  num_periods = len(jax.tree.leaves(blocks)[0])
  for i in range(num_periods):
    for j in range(len(blocks)):
      unrolled[block_name(first + i * len(blocks) + j)] = jax.tree.map(
        lambda x, i=i: x[i], blocks[block_name(j)]
      )
  return unrolled


def block_name(index: int) -> str:
  """Returns the name of a block's parameters."""
  return f'block_{index}'
