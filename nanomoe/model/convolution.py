"""Short causal convolutions over time, one channel at a time."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Activations = Float[Array, 'batch time d_model']
# Inputs of a convolution by position, or None.
ConvCache = Float[Array, 'batch positions d_model'] | None


class ShortConvolution(nn.Module):
  """Causal depthwise convolution `y_t = sum_{j < width} kernel_j * x_{t - j}`.

  It starts as the identity. It gives a token its neighbors before any attention
  does. So et al. 2021 (Primer), sec. 4; Allen-Zhu 2025 (Canon layers), who also
  puts it before attention and feed-forward layers.

  Attributes:
    width: Number of inputs in a sum; 1 disables the convolution.
  """

  width: int

  @nn.compact
  def __call__(
    self, x: Activations, cache: ConvCache, start: Int[Array, ' batch']
  ) -> tuple[Activations, ConvCache]:
    """Returns the convolution of x, and all inputs so far.

    Args:
      x: Inputs at the positions from `start` on.
      cache: Inputs before them, by position; None if `start` is 0.
      start: Position of the first input in each sequence.

    Returns:
      The output, and the cache with x written into it. The cache is None if the
      convolution is disabled.
    """
    if self.width == 1:
      return x, None
    kernel = self.param('filter', _identity, (self.width, x.shape[-1]))
    if cache is None:
      return convolve(x, kernel), x
    cache = jax.vmap(_write)(cache, x, start)
    padded = jnp.pad(cache, ((0, 0), (self.width - 1, 0), (0, 0)))
    size = x.shape[1] + self.width - 1
    # Position p is row p + width - 1 of `padded`. So the slice begins at
    # position start - (width - 1), the first that an output depends on.
    read = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size)
    recent = jax.vmap(read)(padded, start)  # [batch, size, d_model]
    return convolve(recent, kernel)[:, self.width - 1 :], cache


def _identity(key, shape):
  del key
  return jnp.zeros(shape).at[0].set(1)


def _write(cache, x, start):
  return jax.lax.dynamic_update_slice(cache, x, (start, 0))


def convolve(
  x: Activations, kernel: Float[Array, 'width d_model']
) -> Activations:
  """Returns the causal depthwise convolution of x, zero-padded on the left."""
  width, time = len(kernel), x.shape[1]
  padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
  y = kernel[0] * x
  for j in range(1, width):
    y += kernel[j] * padded[:, width - 1 - j : width - 1 - j + time]
  return y
