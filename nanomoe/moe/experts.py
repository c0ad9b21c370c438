"""Experts: feed-forward networks with one set of weights each."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.ops import matmul
from nanomoe.ops.activations import ACTIVATIONS

# Product of each expert's rows, of x or of the hidden layer, with its weights.
PRODUCT = 'gni,gio->gno'

# He et al. 2015; each expert's fan-in is that of its own matrix.
HE = nn.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=0)

# (rows, weights, bias or None) -> rows; the layout of the rows is the
# product's own.
Product = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


@struct.dataclass
class Experts:
  """Weights of G two-layer networks.

  Attributes:
    w_in: Weights of the hidden layer, `[G, d_model, d_ff]`.
    w_out: Weights of the output, `[G, d_ff, d_model]`.
    b_in: Biases of the hidden layer, `[G, d_ff]`, or None.
    b_out: Biases of the output, `[G, d_model]`, or None.
    w_gate: Weights of the gate, shaped as `w_in`; None if the activation has
      no gate.
    activation: Name of the activation, a key of `ACTIVATIONS`.
  """

  # JAX's transformations put values in these fields that are no arrays.
  w_in: Any
  w_out: Any
  b_in: Any = None
  b_out: Any = None
  w_gate: Any = None
  activation: str = struct.field(pytree_node=False, default='gelu')

  def __call__(
    self,
    x: Float[Array, 'G rows d_model'],
    precision: str,
    weight: Float[Array, 'G rows'] | None = None,
  ) -> Float[Array, 'G rows d_model']:
    """Returns each expert's output for its own rows.

    Args:
      x: Rows of each expert.
      precision: Precision of the products, 'float32' or 'bfloat16'.
      weight: Weight of each row's output, or None for 1.
    """

    def product(x, w, bias):
      return matmul.einsum(PRODUCT, x, w, precision, bias)

    if weight is None:
      return self.apply(product, x)
    # The gradient of a weight on the hidden layer needs neither the output nor
    # the last product again.
    hidden = _scale_rows(weight, self._hidden(product, x))
    y = product(hidden, self.w_out, None)
    if self.b_out is None:
      return y
    return y + jnp.einsum('gn,go->gno', weight, self.b_out)

  def apply(
    self, product: Product, x: Float[Array, '*rows d_model']
  ) -> Float[Array, '*rows d_model']:
    """Returns the experts' outputs for rows in the layout of `product`.

    Args:
      product: Multiplies each row by the weights of its expert.
      x: Rows in any layout that `product` understands.
    """
    return product(self._hidden(product, x), self.w_out, self.b_out)

  def _hidden(self, product: Product, x: jax.Array) -> jax.Array:
    hidden = [product(x, self.w_in, self.b_in)]
    if self.w_gate is not None:
      hidden.append(product(x, self.w_gate, None))
    return ACTIVATIONS[self.activation].fn(*hidden)

  def take(self, expert: slice | Int[Array, ' H']) -> 'Experts':
    """Returns the weights of the given experts, in their order."""
    return jax.tree.map(lambda w: w[expert], self)


@jax.custom_vjp
def _scale_rows(
  weight: Float[Array, 'G rows'], x: Float[Array, 'G rows d']
) -> Float[Array, 'G rows d']:
  """Returns `weight[..., None] * x`, whose gradient calls `row_sums`."""
  return weight[..., None] * x


def _scale_rows_forward(weight, x):
  return _scale_rows(weight, x), (weight, x)


def _scale_rows_backward(residuals, g):
  weight, x = residuals
  return matmul.row_sums(g * x), weight[..., None] * g


_scale_rows.defvjp(_scale_rows_forward, _scale_rows_backward)


@runtime_checkable
class MakeExperts(Protocol):
  """Factory of a layer's experts, such as a partial application of `make`."""

  def __call__(
    self, param: Callable[..., jax.Array], d_model: int, /
  ) -> Experts:
    """Returns experts whose weights are parameters made by `param`."""
    ...


def make(
  param: Callable[..., jax.Array],
  d_model: int,
  *,
  num_experts: int,
  d_ff: int,
  activation: str,
  use_bias: bool,
  out_init: nn.initializers.Initializer = HE,
) -> Experts:
  """Returns experts whose weights are new parameters of a module.

  Args:
    param: Method `param` of the module.
    d_model: Width of the residual stream.
    num_experts: Number of experts.
    d_ff: Width of an expert's hidden layer.
    activation: Name of the activation, a key of `ACTIVATIONS`.
    use_bias: Whether both layers have biases.
    out_init: Initializer of the output weights.
  """
  zeros = nn.initializers.zeros_init()

  def weights(name, *shape, init=HE):
    return param(name, init, (num_experts, *shape))

  def bias(name, size):
    return param(name, zeros, (num_experts, size)) if use_bias else None

  gated = ACTIVATIONS[activation].gated
  return Experts(
    w_in=weights('w_in', d_model, d_ff),
    b_in=bias('b_in', d_ff),
    w_gate=weights('w_gate', d_model, d_ff) if gated else None,
    w_out=weights('w_out', d_ff, d_model, init=out_init),
    b_out=bias('b_out', d_model),
    activation=activation,
  )
