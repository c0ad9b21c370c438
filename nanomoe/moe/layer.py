"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import RouterInputs, Routing
from trainers.metrics import Mean


class MoEAux(NamedTuple):
  """What a layer reports of its routing.

  Attributes:
    load: assignments per expert: additive over batches and devices.
    losses: unweighted, by name.
    metrics: the router's and the dispatch's own, by name.
    expert, token: as of `Routing`.
  """

  load: Int[Array, ' experts']
  losses: Mapping[str, Float[Array, '']]
  metrics: Mapping[str, Mean]
  expert: Int[Array, 'rows k']
  token: Int[Array, ' rows'] | None


class MoE(nn.Module):
  """Each token's weighted sum of the experts that the router chose for it.

  Attributes:
    router: makes the router, a module (x, tokens, mask, bias, train) ->
      Routing.
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
    given: RouterInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    routing = self.router()(x, given.tokens, given.mask, given.bias, train)
    experts = self.experts(self.param, x.shape[-1])
    flat = x.reshape(-1, x.shape[-1])
    y, metrics = by_row(self.dispatch, flat, routing, experts, self.precision)
    aux = MoEAux(
      load=routing.load,
      losses=routing.losses,
      metrics={**routing.metrics, **metrics},
      expert=routing.expert,
      token=routing.token,
    )
    return y.reshape(x.shape), aux


def by_row(
  combine: Callable[..., tuple[jax.Array, Mapping[str, Mean]]],
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], Mapping[str, Mean]]:
  """What `combine` makes of the rows of a routing, added up by token."""
  if routing.token is None:
    return combine(x, routing, experts, precision)
  y, metrics = combine(x[routing.token], routing, experts, precision)
  return jnp.zeros_like(x).at[routing.token].add(y), metrics


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
    given: RouterInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], None]:
    del given, train
    expert = self.experts(self.param, x.shape[-1])
    tokens = x.reshape(1, -1, x.shape[-1])
    return expert(tokens, self.precision).reshape(x.shape), None


class RoutedAndShared(nn.Module):
  """Experts that are chosen, plus one that all tokens share.

  Dai et al. 2024 (DeepSeekMoE), sec. 3.2.

  Attributes:
    chosen, shared: make modules (x, given, train) -> (y, what it reports).
  """

  chosen: Callable[[], nn.Module]
  shared: Callable[[], nn.Module]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    given: RouterInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    chosen, aux = self.chosen()(x, given, train=train)
    shared, _ = self.shared()(x, given, train=train)
    return chosen + shared, aux
