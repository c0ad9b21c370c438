"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from nanomoe.experts import Experts
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
    experts: (param, d_model) -> Experts, as of `experts.make`.
    dispatch: (x, routing, experts, precision) -> (y, metrics), as of
      `dispatchers.build`.
    precision: of the experts' products.
  """

  router: Callable[[], nn.Module]
  experts: Callable[..., Experts]
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
    experts = self.experts(self.param, x.shape[-1])
    y, metrics = self.dispatch(tokens, routing, experts, self.precision)
    aux = MoEAux(routing.load, routing.losses, {**routing.metrics, **metrics})
    return y.reshape(x.shape), aux


class FeedForward(nn.Module):
  """One expert, for every token.

  Attributes:
    experts: (param, d_model) -> Experts, one.
    precision: of its products.
  """

  experts: Callable[..., Experts]
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    mask: Bool[Array, 'batch time'],
  ) -> tuple[Float[Array, 'batch time d_model'], None]:
    del mask
    expert = self.experts(self.param, x.shape[-1])
    tokens = x.reshape(1, -1, x.shape[-1])
    return expert(tokens, self.precision).reshape(x.shape), None


class Sum(nn.Module):
  """Experts that are chosen, plus one that all tokens share.

  Dai et al. 2024 (DeepSeekMoE), sec. 3.2.

  Attributes:
    chosen, shared: make modules (x, mask) -> (y, what it reports).
  """

  chosen: Callable[[], nn.Module]
  shared: Callable[[], nn.Module]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    mask: Bool[Array, 'batch time'],
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    chosen, aux = self.chosen()(x, mask)
    shared, _ = self.shared()(x, mask)
    return chosen + shared, aux
