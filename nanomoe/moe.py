"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe import dispatch
from nanomoe.dispatch import Experts
from nanomoe.routing import Given, Routing
from trainers.metrics import Mean


class MoEAux(NamedTuple):
  """What a layer reports of its routing.

  Attributes:
    load: assignments per expert: additive over batches and devices.
    losses: unweighted, by name.
    metrics: the router's own, by name.
  """

  load: Int[Array, ' experts']
  losses: Mapping[str, Float[Array, '']]
  metrics: Mapping[str, Mean]


class MoE(nn.Module):
  """Each token's weighted sum of the experts that the router chose for it.

  Attributes:
    router: makes the router, a module (x, tokens, mask, bias, train) ->
      Routing.
    num_experts: E.
    d_ff: width of an expert's hidden layer.
    dispatch: a name in `dispatch.DISPATCH`.
    precision: of the experts' products.
  """

  router: Callable[[], nn.Module]
  num_experts: int
  d_ff: int
  dispatch: str
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    given: Given,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    routing = self.router()(x, given.tokens, given.mask, given.bias, train)
    experts = self._experts(x.shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    combine = dispatch.DISPATCH[self.dispatch]
    y = by_row(combine, flat, routing, experts, self.precision)
    aux = MoEAux(routing.load, routing.losses, routing.metrics)
    return y.reshape(x.shape), aux

  def _experts(self, d_model: int) -> Experts:
    # He et al. 2015, for each expert on its own.
    init = nn.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=0)
    zeros = nn.initializers.zeros_init()
    num_experts, d_ff = self.num_experts, self.d_ff
    return Experts(
      w_in=self.param('w_in', init, (num_experts, d_model, d_ff)),
      b_in=self.param('b_in', zeros, (num_experts, d_ff)),
      w_out=self.param('w_out', init, (num_experts, d_ff, d_model)),
      b_out=self.param('b_out', zeros, (num_experts, d_model)),
    )


def by_row(
  combine: Callable[..., jax.Array],
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> Float[Array, 'tokens d_model']:
  """What `combine` makes of the rows of a routing, added up by token."""
  if routing.token is None:
    return combine(x, routing, experts, precision)
  y = combine(x[routing.token], routing, experts, precision)
  return jnp.zeros_like(x).at[routing.token].add(y)
