"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from nanomoe import dispatch
from nanomoe.dispatch import Experts
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
    router: makes the router, a module (x, mask) -> Routing.
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
    mask: Bool[Array, 'batch time'],
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    tokens = x.reshape(-1, x.shape[-1])
    routing = self.router()(tokens, mask.reshape(-1))
    experts = _experts(self.param, self.num_experts, x.shape[-1], self.d_ff)
    combine = dispatch.DISPATCH[self.dispatch]
    y = combine(tokens, routing, experts, self.precision)
    aux = MoEAux(routing.load, routing.losses, routing.metrics)
    return y.reshape(x.shape), aux


class FeedForward(nn.Module):
  """A dense layer in the place of MoE: one expert, for every token.

  Attributes:
    d_ff: width of the hidden layer.
    precision: of products.
  """

  d_ff: int
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    mask: Bool[Array, 'batch time'],
  ) -> tuple[Float[Array, 'batch time d_model'], None]:
    del mask
    expert = _experts(self.param, 1, x.shape[-1], self.d_ff)
    tokens = x.reshape(1, -1, x.shape[-1])
    return expert(tokens, self.precision).reshape(x.shape), None


def _experts(
  param: Callable[..., Array], num_experts: int, d_model: int, d_ff: int
) -> Experts:
  # He et al. 2015, for each expert on its own.
  init = nn.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=0)
  zeros = nn.initializers.zeros_init()
  return Experts(
    w_in=param('w_in', init, (num_experts, d_model, d_ff)),
    b_in=param('b_in', zeros, (num_experts, d_ff)),
    w_out=param('w_out', init, (num_experts, d_ff, d_model)),
    b_out=param('b_out', zeros, (num_experts, d_model)),
  )
