"""Normalization along the last axis."""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-6


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + 1e-6) * scale. Zhang and Sennrich 2019, eq. 4."""

  @nn.compact
  def __call__(self, x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    scale = self.param('scale', nn.initializers.ones_init(), x.shape[-1:])
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + EPSILON) * scale


def identity(name: str) -> Callable[[jax.Array], jax.Array]:
  """No norm, where a norm could be."""
  del name
  return lambda x: x


# Each makes, of a name, a module x -> x.
NORMS = {
  'LayerNorm': functools.partial(nn.LayerNorm, epsilon=EPSILON),
  'RMSNorm': RMSNorm,
}
