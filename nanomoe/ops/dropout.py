"""Dropout whose random bits are a hash: recomputed where needed, never kept."""

import math

from flax import linen as nn
import jax
import jax.numpy as jnp


def keep_mask(
  key: jax.Array, rate: float, shape: tuple[int, ...]
) -> tuple[jax.Array, float]:
  """bool[shape], and the exact probability of True; `rate` to 2**-32.

  The 32 bits of element i are a hash of i and the key's first and last word,
  which a fold_in has mixed. XLA fuses it into what uses the mask: Threefry on
  CPUs is a loop that writes its words to memory, and costs four times as much.
  """
  words = jax.random.key_data(key).reshape(-1)
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    index += stride * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
  # Between two rounds, or the masks of two keys would be permutations of one
  # another by an exclusive or.
  bits = _mix(_mix(index ^ words[0]) + words[-1])
  threshold = round(rate * 2**32)
  return bits >= jnp.uint32(threshold), 1 - threshold / 2**32


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32 bits in which each flips half of the others.

  Constants: Wellons 2018, "Prospecting for Hash Functions", lowbias32.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  """Zeroes elements with probability `rate` and rescales the rest.

  Srivastava et al. 2014. The expectation is exactly the input.
  """
  mask, keep = keep_mask(key, rate, x.shape)
  return jnp.where(mask, x * (1 / keep), 0.0)


class Dropout(nn.Module):
  """`dropout` in training, with a key of the stream 'dropout'."""

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if not train or self.rate == 0.0:
      return x
    return dropout(x, self.make_rng('dropout'), self.rate)
