"""Shares of the cores and GPUs of a machine, for processes side by side."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import sys


def share(whole: Sequence[int], index: int, num_shares: int) -> Sequence[int]:
  """Returns a share of cores or devices, or none if there are too few.

  Args:
    whole: Cores or devices of the machine.
    index: Number of the share.
    num_shares: Number of shares, of equal size.
  """
  size = len(whole) // num_shares
  return whole[index * size : (index + 1) * size]


def cores() -> list[int]:
  """Returns the cores that this process may use, none if unknown."""
  if sys.platform != 'linux':
    return []
  return sorted(os.sched_getaffinity(0))


def gpus(environ: Mapping[str, str]) -> Sequence[int]:
  """Returns the indices of the NVIDIA GPUs that this process may use."""
  visible = environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:
    return range(len([name for name in visible.split(',') if name]))
  return range(len(list(pathlib.Path('/proc/driver/nvidia/gpus').glob('*'))))
