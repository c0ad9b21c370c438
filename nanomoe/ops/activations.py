"""What makes a hidden layer of products' results."""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """X * Phi(x) with Hendrycks and Gimpel's tanh for the normal's Phi (2016).

  As jax.nn.gelu, whose gradient keeps several arrays of x's size: on a CPU
  writing and reading them costs more than another tanh.
  """
  return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, g):
  # x / 2 * (1 + tanh z) with z = scale * (x + cubic * x**3), by the product
  # rule.
  scale, cubic = math.sqrt(2 / math.pi), 0.044715
  square = x * x
  tanh = jnp.tanh(scale * x * (1 + cubic * square))
  slope = scale * (1 + 3 * cubic * square)
  return (g * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * slope),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def squared_relu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """max(x, 0)^2. So et al. 2021 (Primer)."""
  positive = jax.nn.relu(x)
  return positive * positive


def swiglu(
  x: Float[Array, '*shape'], gate: Float[Array, '*shape']
) -> Float[Array, '*shape']:
  """X * silu(gate). Shazeer 2020."""
  return x * jax.nn.silu(gate)


class Activation(NamedTuple):
  """Of a hidden layer; where `gated`, of two products' results."""

  fn: Callable[..., Float[Array, '*shape']]
  gated: bool = False


ACTIVATIONS = {
  'gelu': Activation(gelu),
  'relu2': Activation(squared_relu),
  'swiglu': Activation(swiglu, gated=True),
}
