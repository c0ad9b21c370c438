"""The experts: feed-forward networks with one set of weights each."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax import struct
import jax
from jaxtyping import Array, Float, Int

from nanomoe.ops.activations import ACTIVATIONS
from nanomoe.ops.matmul import einsum

# x, or the hidden layer, of an expert by one of its weights.
PRODUCT = 'gni,gio->gno'

# He et al. 2015, for each expert on its own.
HE = nn.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=0)

# (rows, weights, bias or None) -> rows, whatever the rows are.
Product = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


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
    return self.apply(
      lambda x, w, bias: einsum(PRODUCT, x, w, precision, bias), x
    )

  def apply(
    self, product: Product, x: Float[Array, '*rows d_model']
  ) -> Float[Array, '*rows d_model']:
    """The same of rows in any order: `product` knows whose they are."""
    hidden = [product(x, self.w_in, self.b_in)]
    if self.w_gate is not None:
      hidden.append(product(x, self.w_gate, None))
    hidden = ACTIVATIONS[self.activation].fn(*hidden)
    return product(hidden, self.w_out, self.b_out)

  def take(self, expert: Int[Array, ' H']) -> 'Experts':
    """Those experts."""
    return jax.tree.map(lambda w: w[expert], self)


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
