"""Functions of tokens, applied to a chunk of each sequence at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_chunks(fn: Callable[..., Any], size: int, *arrays: jax.Array) -> Any:
  """Returns `fn(*arrays)`, computed for `size` positions at a time.

  Neither the result nor its gradient ever holds what `fn` computes for more
  than one chunk. The gradient runs `fn` again for each chunk. Chunks divide
  axis 1, so that a batch that is divided over devices along axis 0 stays where
  it is.

  Args:
    fn: Function of arrays `[batch, n, ...]` to a pytree of arrays `[batch, n,
      ...]`, which treats each token by itself. It may close over arrays, which
      have gradients too.
    size: Largest number of positions in a chunk, at least 1. Chunks have equal
      sizes, and the last one may be padded with zeros.
    *arrays: Arrays `[batch, time, ...]`.
  """
  time = arrays[0].shape[1]
  num_chunks = -(-time // size)
  size = -(-time // num_chunks)

  def split(x):
    x = jnp.pad(
      x, [(0, 0), (0, num_chunks * size - time)] + (x.ndim - 2) * [(0, 0)]
    )
    x = x.reshape(len(x), num_chunks, size, *x.shape[2:])
    return x.swapaxes(0, 1)  # [chunks, batch, size, ...]

  def join(x):
    x = x.swapaxes(0, 1)
    return x.reshape(len(x), num_chunks * size, *x.shape[3:])[:, :time]

  # A loop separates the passes, so that no barrier is needed: XLA cannot move
  # the recomputation of a chunk out of the loop of the backward pass.
  again = jax.checkpoint(fn, prevent_cse=False)
  chunks = tuple(map(split, arrays))
  _, results = jax.lax.scan(lambda _, x: (None, again(*x)), None, chunks)
  return jax.tree.map(join, results)
