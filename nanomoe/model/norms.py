"""Normalization along the last axis."""

from collections.abc import Callable
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-6


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + 1e-6) * scale + bias. Ba et al. 2016."""

  @nn.compact
  def __call__(self, x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    shape = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones_init(), shape)
    bias = self.param('bias', nn.initializers.zeros_init(), shape)
    rows = x.reshape(-1, x.shape[-1])
    return layer_norm(rows, scale, bias).reshape(x.shape)


@jax.custom_vjp
def layer_norm(
  x: Float[Array, 'rows d'], scale: Float[Array, ' d'], bias: Float[Array, ' d']
) -> Float[Array, 'rows d']:
  """As nn.LayerNorm, whose gradient costs twice as much on CPUs.

  It writes to memory, as wide as x, what is one number for a row.
  """
  return _forward(x, scale, bias)[0]


def _forward(x, scale, bias):
  mean = jnp.mean(x, axis=-1, keepdims=True)
  # Rounding may leave less than nothing.
  variance = jnp.maximum(jnp.mean(x * x, axis=-1, keepdims=True) - mean**2, 0)
  inverse = jax.lax.rsqrt(variance + EPSILON)
  return (x - mean) * inverse * scale + bias, (x, scale, mean, inverse)


def _backward(residuals, g):
  x, scale, mean, inverse = residuals
  normed = (x - mean) * inverse
  both = g * normed
  # Sums over a row as products with a vector: nothing more is written.
  dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  of_mean = dot(g, scale / x.shape[-1])[:, None]
  of_inverse = dot(both, scale / x.shape[-1])[:, None]
  dx = (g * scale - of_mean - normed * of_inverse) * inverse
  return dx, both.sum(axis=0), g.sum(axis=0)


layer_norm.defvjp(_forward, _backward)


class RMSNorm(nn.Module):
  """x / sqrt(mean(x^2) + 1e-6) * scale. Zhang and Sennrich 2019, eq. 4."""

  @nn.compact
  def __call__(self, x: Float[Array, '*rows d']) -> Float[Array, '*rows d']:
    scale = self.param('scale', nn.initializers.ones_init(), x.shape[-1:])
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(square + EPSILON) * scale


def no_norm(name: str) -> Callable[[jax.Array], jax.Array]:
  """No norm, where a norm could be."""
  del name
  return lambda x: x


# Each makes, of a name, a module x -> x.
NORMS = {'LayerNorm': LayerNorm, 'RMSNorm': RMSNorm}
