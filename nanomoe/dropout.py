"""Dropout that uses every random bit it draws."""

from flax import linen as nn
import jax
import jax.numpy as jnp


def keep_mask(
  key: jax.Array, rate: float, shape: tuple[int, ...]
) -> tuple[jax.Array, float]:
  """bool[shape], and the exact probability of True.

  Sixteen bits decide over an element, two elements to a 32-bit draw (Threefry
  costs the same whatever the width): `rate` is met to 1 / 65536.
  """
  size = 1
  for n in shape:
    size *= n
  words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
  threshold = round(rate * 65536)
  return (halves[:size] >= threshold).reshape(shape), 1 - threshold / 65536


class Dropout(nn.Module):
  """Zeroes elements with probability `rate` and rescales the rest.

  Srivastava et al. 2014. The expectation is exactly the input.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    if not train or self.rate == 0.0:
      return x
    mask, keep = keep_mask(self.make_rng('dropout'), self.rate, x.shape)
    return jnp.where(mask, x / keep, 0.0)
