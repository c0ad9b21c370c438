"""The experts: feed-forward networks with one set of weights each."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jaxtyping import Array, Float, Int

from nanomoe import numerics
from nanomoe.activations import ACTIVATIONS
from nanomoe.numerics import dot

# x, or the hidden layer, of an expert by one of its weights.
PRODUCT = 'gni,gio->gno'

# He et al. 2015, for each expert on its own.
HE = nn.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=0)

# (rows, weights, bias or None) -> rows, whatever the rows are.
Product = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def product(
  x: jax.Array, w: jax.Array, bias: jax.Array | None, precision: str
) -> jax.Array:
  """Rows of G experts, each by its own weights: a `Product`."""
  return dot(PRODUCT, x, w, precision, bias)


@struct.dataclass
class Experts:
  """Two-layer networks, G of them.

  Attributes:
    w_in, b_in: to the hidden layer: [G, d_model, d_ff], [G, d_ff].
    w_gate: to its gate, as w_in; None where the activation has none.
    w_out, b_out: from it: [G, d_ff, d_model], [G, d_model].
    activation: a name in `ACTIVATIONS`.
  """

  # JAX puts other things than arrays in their places.
  w_in: Any
  w_out: Any
  b_in: Any = None
  b_out: Any = None
  w_gate: Any = None
  activation: str = struct.field(pytree_node=False, default='gelu')

  def __call__(
    self, x: Float[Array, 'G rows d_model'], precision: str
  ) -> Float[Array, 'G rows d_model']:
    """Each expert's rows through it."""
    run = functools.partial(product, precision=precision)
    return self.after(self.before(x, run), run)

  def before(
    self, x: Float[Array, '*rows d_model'], product: Product
  ) -> list[Float[Array, '*rows d_ff']]:
    """What the hidden layer is made of."""
    return [product(x, *layer) for layer in self.inputs]

  def after(
    self, before: list[Float[Array, '*rows d_ff']], product: Product
  ) -> Float[Array, '*rows d_model']:
    return product(self.activate(*before), self.w_out, self.b_out)

  @property
  def inputs(self) -> list[tuple[jax.Array, jax.Array | None]]:
    """Weights and bias of each product that the hidden layer is made of."""
    gate = [] if self.w_gate is None else [(self.w_gate, None)]
    return [(self.w_in, self.b_in), *gate]

  def activate(
    self, *before: Float[Array, '*rows d_ff']
  ) -> Float[Array, '*rows d_ff']:
    return ACTIVATIONS[self.activation].fn(*before)

  def gradients(
    self,
    x: Float[Array, 'G rows d_model'],
    before: list[Float[Array, 'G rows d_ff']],
    of_y: Float[Array, 'G rows d_model'],
    precision: str,
  ) -> tuple[Float[Array, 'G rows d_model'], 'Experts']:
    """Of sum(of_y * self(x, precision)): of x, and of what self holds.

    By hand: `jax.vjp` would trace the last product once more, for nothing.

    Args:
      x: as of __call__.
      before: `self.before(x)`.
      of_y: of __call__'s result.
      precision: of products.
    """
    hidden, gradient_of = jax.vjp(self.activate, *before)
    of_hidden, *out = numerics.gradients(
      PRODUCT, hidden, self.w_out, of_y, precision
    )
    of_x, of_inputs = [], []
    for (w, _), g in zip(self.inputs, gradient_of(of_hidden), strict=True):
      more, *of_layer = numerics.gradients(PRODUCT, x, w, g, precision)
      of_x.append(more)
      of_inputs.append(of_layer)
    (w_in, b_in), gate = of_inputs[0], of_inputs[1:]
    return sum(of_x[1:], of_x[0]), dataclasses.replace(
      self,
      w_in=w_in,
      w_out=out[0],
      b_in=None if self.b_in is None else b_in,
      b_out=None if self.b_out is None else out[1],
      w_gate=gate[0][0] if gate else None,
    )

  def of(self, expert: Int[Array, ' H']) -> 'Experts':
    """Those experts."""
    return jax.tree.map(lambda w: w[expert], self)

  def rounded(self, precision: str) -> 'Experts':
    """Weights as their products read them."""
    return jax.tree.map(
      lambda w: numerics.rounded(w, precision) if w.ndim == 3 else w, self
    )


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
  """Experts of new parameters of a module, whose `param` is given."""
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
