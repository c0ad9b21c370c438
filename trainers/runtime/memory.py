"""Memory that a training step needs, and errors that explain a shortage."""

from collections.abc import Callable
import contextlib
import ctypes
import math
from typing import Any, NamedTuple

import jax

from trainers.errors import UserError, is_out_of_memory
from trainers.runtime import host_memory


class StepMemory(NamedTuple):
  """Memory of a training step, in bytes.

  It is that of one device. Devices of a CPU share its memory, so there it is
  that of all of them.

  Attributes:
    state: Memory of the parameters, the optimizer state and the model state.
    temporaries: Memory that a step allocates besides: activations, gradients.
    free: Memory that is free before the first step; None if unknown.
  """

  state: int
  temporaries: int
  free: int | None

  @property
  def fits(self) -> bool:
    return self.free is None or self.temporaries <= self.free

  def __str__(self) -> str:
    free = '' if self.free is None else f', and {_gb(self.free)} are free'
    return (
      f'a step needs {_gb(self.temporaries)} beside {_gb(self.state)} of '
      f"parameters and optimizer's state{free}"
    )


# Function that names the settings that would reduce the memory of a step.
Hint = Callable[[StepMemory], str]


def measure(step: jax.stages.Compiled, state: Any) -> StepMemory | None:
  """Returns the memory of a compiled step, or None if XLA does not report it.

  Args:
    step: Compiled step.
    state: State that the step takes, already allocated.
  """
  analysis = step.memory_analysis()
  if analysis is None:
    return None
  on_host = jax.default_backend() == 'cpu'
  leaves = jax.tree.leaves(state)
  copies = len(leaves[0].sharding.addressable_devices) if on_host else 1
  return StepMemory(
    state=copies * sum(map(_bytes_per_device, leaves)),
    temporaries=copies * temporaries(analysis),
    free=_free_on_host() if on_host else _free_on_device(),
  )


def temporaries(analysis: Any) -> int:
  """Returns the bytes that a device allocates besides the program's arguments.

  Args:
    analysis: Result of `memory_analysis()` of the compiled program.
  """
  return (
    analysis.temp_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
  )


def _bytes_per_device(x: jax.Array) -> int:
  return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def trim() -> None:
  """Returns free memory to the system.

  After compiling, glibc keeps hundreds of megabytes.
  """
  with contextlib.suppress(OSError, AttributeError):  # Another C library.
    ctypes.CDLL(None).malloc_trim(0)


def explained(
  error: BaseException, step: int, memory: StepMemory | None, hint: Hint
) -> BaseException:
  """Returns an out-of-memory error with suggestions; other errors unchanged.

  Args:
    error: Error of a training step.
    step: Number of completed steps.
    memory: Memory of a step, if known.
    hint: Returns suggestions for `memory`.
  """
  if not is_out_of_memory(error):
    return error
  details = f': {memory}; {hint(memory)}' if memory else f': {error}'
  explanation = UserError(f'out of memory after step {step}{details}')
  explanation.__cause__ = error
  return explanation


def _gb(num_bytes: int) -> str:
  return f'{num_bytes / 1e9:.{2 if num_bytes < 1e9 else 1}f} GB'


def _free_on_device() -> int | None:
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'bytes_limit' not in stats:
    return None
  return stats['bytes_limit'] - stats['bytes_in_use']


def _free_on_host() -> int | None:
  return host_memory.free()
