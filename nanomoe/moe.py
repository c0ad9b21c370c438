"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from nanomoe.dispatch import Experts
from trainers.metrics import Mean


class MoEAux(NamedTuple):
  """What a layer reports of its routing.

  Attributes:
    load: assignments per expert: additive over batches and devices.
    losses: unweighted, by name.
    metrics: the router's and the dispatch's own, by name.
  """

  load: Int[Array, ' experts']
  losses: Mapping[str, Float[Array, '']]
  metrics: Mapping[str, Mean]


class MoE(nn.Module):
  """Each token's weighted sum of the experts that the router chose for it.

  Attributes:
    router: makes the router, a module (x, mask) -> Routing.
    num_experts: E.
    d_ff: width of an expert's hidden layer.
    dispatch: (x, routing, experts, precision) -> (y, metrics), as of
      `dispatchers.build`.
    precision: of the experts' products.
  """

  router: Callable[[], nn.Module]
  num_experts: int
  d_ff: int
  dispatch: Callable[..., tuple[jax.Array, Mapping[str, Mean]]]
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    mask: Bool[Array, 'batch time'],
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    tokens = x.reshape(-1, x.shape[-1])
    routing = self.router()(tokens, mask.reshape(-1))
    experts = self._experts(x.shape[-1])
    y, metrics = self.dispatch(tokens, routing, experts, self.precision)
    aux = MoEAux(routing.load, routing.losses, {**routing.metrics, **metrics})
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
