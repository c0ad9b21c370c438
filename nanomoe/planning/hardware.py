"""Devices by name, and amounts of memory as users write them."""

import contextlib
import re
from typing import NamedTuple

from nanomoe.config import overrides
from trainers.errors import UserError

_UNITS = {
  'B': 1,
  **{f'{p}B': 1000**i for i, p in enumerate('KMGT', 1)},
  **{f'{p}iB': 1024**i for i, p in enumerate('KMGT', 1)},
}


class Device(NamedTuple):
  """Accelerator, by its data sheet.

  Attributes:
    peak_flops: Dense bfloat16 products, FLOP/s.
    memory: Memory, bytes.
  """

  peak_flops: float
  memory: int


DEVICES = {
  'a100': Device(312e12, 80 * 10**9),
  'h100': Device(989e12, 80 * 10**9),
  'h200': Device(989e12, 141 * 10**9),
}


def parse_bytes(text: str, name: str) -> int:
  """Returns the bytes that a text such as '80GB', '80GiB' or '8e10' means.

  Args:
    text: Number with a unit of `_UNITS`, or without, which means bytes.
    name: Name of the option, for the error.

  Raises:
    UserError: The text is not an amount of memory above 0.
  """
  match = re.fullmatch(r'\s*([0-9.eE+]+?)\s*([KMGT]?i?B)?\s*', text)
  value = 0.0
  if match and (match[2] or 'B') in _UNITS:
    with contextlib.suppress(ValueError, OverflowError):
      value = overrides.number(float, match[1]) * _UNITS[match[2] or 'B']
  if not 1 <= value < 2**63:
    raise UserError(
      f'{name}={text}: it must be an amount of memory above 0, such as 80GB, '
      '80GiB or 8e10'
    )
  return int(value)


def shown(num_bytes: float | int) -> str:
  """Returns bytes with a decimal unit and three digits, such as '1.53 GB'."""
  value = float(num_bytes)
  for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
    if abs(value) < 999.5 or unit == 'TB':
      break
    value /= 1000
  if unit == 'B':
    return f'{value:.0f} B'
  digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
  return f'{value:.{digits}f} {unit}'
