"""Dropout with random bits from a hash, which are recomputed and never kept."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp


def keep_mask(
  key: jax.Array, rate: float, shape: tuple[int, ...]
) -> tuple[jax.Array, float]:
  """Returns a mask of kept elements, and the exact probability of keeping one.

  The 32 bits of element i are a hash of i and the key's first and last word,
  which a fold_in has mixed. XLA fuses the hash into the operation that uses the
  mask. Threefry costs four times as much on CPUs, where it is a loop that
  writes its words to memory.

  Args:
    key: Random key.
    rate: Probability of dropping an element, rounded to 2**-32.
    shape: Shape of the mask.
  """
  words = jax.random.key_data(key).reshape(-1)
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    index += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  # The second word enters between two rounds. In one round, the masks of two
  # keys would be permutations of each other by an exclusive or.
  bits = _mix(_mix(index ^ words[0]) + words[-1])
  threshold = round(rate * 2**32)
  return bits >= jnp.uint32(threshold), 1 - threshold / 2**32


def _mix(x: jax.Array) -> jax.Array:
  """Returns a bijection of 32 bits, in which each bit flips half of the others.

  Its constants are lowbias32 of Wellons 2018, "Prospecting for Hash Functions".
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  """Zeroes elements with probability `rate` and rescales the others.

  Srivastava et al. 2014. The expectation is exactly the input.

  Args:
    x: Activations.
    key: Random key.
    rate: Probability of dropping an element.
  """
  mask, keep = keep_mask(key, rate, x.shape)
  return jnp.where(mask, x * (1 / keep), 0.0)


class Dropout(nn.Module):
  """Dropout layer, with keys of the stream 'dropout'.

  Attributes:
    rate: Probability of dropping an element; 0 disables dropout.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Returns x, with elements dropped in training."""
    if not train or self.rate == 0.0:
      return x
    return dropout(x, self.make_rng('dropout'), self.rate)
