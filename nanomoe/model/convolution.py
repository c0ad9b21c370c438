"""Short causal convolutions over time, a channel by itself."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rows = Float[Array, 'batch time d_model']
ConvCache = Float[Array, 'batch positions d_model'] | None


class ShortConvolution(nn.Module):
  """y_t = sum_j kernel_j * x_(t - j), j < width: the identity at the start.

  What a token is next to is then known before any attention. So et al. 2021
  (Primer), sec. 4, and Allen-Zhu 2025 (Canon layers), which stand, as here,
  before attention and feed-forward layers. Causal.

  Attributes:
    width: of the kernel; 1: there is no convolution.
  """

  width: int

  @nn.compact
  def __call__(
    self, x: Rows, seen: ConvCache, start: Int[Array, ' batch']
  ) -> tuple[Rows, ConvCache]:
    """y, and the inputs so far.

    Args:
      x: inputs at positions start, start + 1, ...
      seen: inputs before, by position; None: start is 0.
      start: the first one's position, by sequence.
    """
    if self.width == 1:
      return x, None
    kernel = self.param('filter', _identity, (self.width, x.shape[-1]))
    if seen is None:
      return convolve(x, kernel), x
    seen = jax.vmap(_write)(seen, x, start)
    padded = jnp.pad(seen, ((0, 0), (self.width - 1, 0), (0, 0)))
    size = x.shape[1] + self.width - 1
    # From width - 1 before the first on; position 0 stands at width - 1.
    read = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    last = jax.vmap(read)(padded, start)
    return convolve(last, kernel)[:, self.width - 1 :], seen


def _identity(key, shape):
  del key
  return jnp.zeros(shape).at[0].set(1)


def _write(seen, x, start):
  return jax.lax.dynamic_update_slice(seen, x, (start, 0))


def convolve(x: Rows, kernel: Float[Array, 'width d_model']) -> Rows:
  """With zeros for what is before the first."""
  width, time = len(kernel), x.shape[1]
  padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
  y = kernel[0] * x
  for j in range(1, width):
    y += kernel[j] * padded[:, width - 1 - j : width - 1 - j + time]
  return y
