"""Activation functions of hidden layers."""

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gelu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Returns `x * Phi(x)`, with Phi approximated by a tanh.

  Hendrycks and Gimpel 2016. The values are those of jax.nn.gelu. The gradient
  keeps x alone and computes the tanh again. The gradient of jax.nn.gelu keeps
  several arrays of x's size, and on CPUs writing and reading these arrays costs
  more than another tanh.

  Args:
    x: Activations.
  """
  return jax.nn.gelu(x, approximate=True)


def _gelu_forward(x):
  return gelu(x), x


def _gelu_backward(x, g):
  # Product rule for x / 2 * (1 + tanh z), where z = scale * (x + cubic * x**3).
  scale, cubic = math.sqrt(2 / math.pi), 0.044715
  square = x * x
  tanh = jnp.tanh(scale * x * (1 + cubic * square))
  slope = scale * (1 + 3 * cubic * square)
  return (g * 0.5 * (1 + tanh + x * (1 - tanh * tanh) * slope),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def squared_relu(x: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """Returns `max(x, 0)^2`. So et al. 2021 (Primer).

  Args:
    x: Activations.
  """
  positive = jax.nn.relu(x)
  return positive * positive


@jax.custom_vjp
def swiglu(
  x: Float[Array, '*shape'], gate: Float[Array, '*shape']
) -> Float[Array, '*shape']:
  """Returns `x * silu(gate)`. Shazeer 2020.

  The sigmoid is computed as `(1 + tanh(gate / 2)) / 2`, because XLA's tanh is
  faster than its exponential and division on CPUs. As in `gelu`, the gradient
  keeps the arguments alone.

  Args:
    x: Activations.
    gate: Result of a second product with the layer's input.
  """
  return x * gate * _sigmoid(gate)


def _sigmoid(x: jax.Array) -> jax.Array:
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def _swiglu_forward(x, gate):
  return swiglu(x, gate), (x, gate)


def _swiglu_backward(residuals, g):
  x, gate = residuals
  sigmoid = _sigmoid(gate)
  silu = gate * sigmoid
  return g * silu, g * x * (sigmoid + silu * (1 - sigmoid))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class Activation(NamedTuple):
  """Activation of a hidden layer.

  Attributes:
    fn: Activation function, of one argument, or of two if gated.
    gated: Whether the function has a gate, the result of a second product.
  """

  fn: Callable[..., Float[Array, '*shape']]
  gated: bool = False


# Activations by the value of `moe.activation`.
ACTIVATIONS = {
  'gelu': Activation(gelu),
  'relu2': Activation(squared_relu),
  'swiglu': Activation(swiglu, gated=True),
}
