"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.interface import DispatchFn
from nanomoe.moe.experts import Experts, MakeExperts
from nanomoe.moe.losses import Shares
from nanomoe.moe.routing import RouterInputs, Routing
from trainers.metrics import Mean

# Name of the choices of a layer in the collection 'intermediates' of Flax.
CHOICES = 'choices'


class MoEAux(NamedTuple):
  """Report of a layer on its routing.

  Attributes:
    load: Number of assignments of each expert. Loads of several batches, or of
      several devices, may be added up.
    losses: Unweighted losses by name, as in `Routing`.
    metrics: Metrics of the router and of the dispatch, by name.
    expert: Experts of each row, as in `Routing`.
    token: Token of each row, as in `Routing`.
  """

  load: Int[Array, ' experts']
  losses: Mapping[str, Mean | Shares]
  metrics: Mapping[str, Mean]
  expert: Int[Array, 'rows k']
  token: Int[Array, ' rows'] | None


class Choices(NamedTuple):
  """Experts and weights of each row, which `MoE` sows for the inspection.

  Attributes:
    expert: Experts of each row, as in `Routing`.
    weight: Weights of these experts, as in `Routing`.
    token: Token of each row, as in `Routing`.
  """

  expert: Int[Array, 'rows k']
  weight: Float[Array, 'rows k']
  token: Int[Array, ' rows'] | None


class MoE(nn.Module):
  """Layer that gives each token the weighted sum of its experts' outputs.

  Attributes:
    router: Factory of the router, a module `(x, inputs, *, train) -> Routing`.
    experts: Factory of the experts.
    dispatch: Dispatch in training, as built by `registry.build`.
    eval_dispatch: Dispatch in evaluation and generation.
    precision: Precision of the experts' products.
  """

  router: Callable[[], nn.Module]
  experts: MakeExperts
  dispatch: DispatchFn
  eval_dispatch: DispatchFn
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: RouterInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    """Routes, dispatches, applies the experts and combines their outputs.

    Args:
      x: Activations.
      inputs: Token ids, padding mask and selection bias.
      train: Selects the router's noise and the dispatch of training.

    Returns:
      The layer's output and the report on its routing.
    """
    # Route: the experts of each token, with their weights.
    routing = self.router()(x, inputs, train=train)
    # Nothing is stored, unless a caller makes the collection mutable.
    self.sow(
      'intermediates',
      CHOICES,
      Choices(routing.expert, routing.weight, routing.token),
    )
    experts = self.experts(self.param, x.shape[-1])
    # Dispatch tokens to experts, apply the experts, combine their outputs.
    tokens = x.reshape(-1, x.shape[-1])  # [tokens, d_model]
    dispatch = self.dispatch if train else self.eval_dispatch
    y, metrics = dispatch_rows(
      dispatch, tokens, routing, experts, self.precision
    )
    aux = MoEAux(
      load=routing.load,
      losses=routing.losses,
      metrics={**routing.metrics, **metrics},
      expert=routing.expert,
      token=routing.token,
    )
    return y.reshape(x.shape), aux


def dispatch_rows(
  dispatch: DispatchFn,
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], Mapping[str, Mean]]:
  """Dispatches the rows of a routing and adds up the rows of each token.

  Args:
    dispatch: Dispatch of rows.
    x: Activations of the tokens.
    routing: Routing of the tokens.
    experts: Experts of the layer.
    precision: Precision of the experts' products.

  Returns:
    The combined output of each token, and the dispatch's metrics.
  """
  if routing.token is None:
    return dispatch(x, routing, experts, precision)
  rows = x[routing.token]  # [rows, d_model]
  y, metrics = dispatch(rows, routing, experts, precision)
  return jnp.zeros_like(x).at[routing.token].add(y), metrics


class FeedForward(nn.Module):
  """Dense feed-forward layer: one expert for every token.

  Attributes:
    experts: Factory of the one expert.
    precision: Precision of its products.
  """

  experts: MakeExperts
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: RouterInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], None]:
    """Returns the expert's output, and None: there is no routing to report."""
    del inputs, train
    expert = self.experts(self.param, x.shape[-1])
    tokens = x.reshape(1, -1, x.shape[-1])  # [1, tokens, d_model]
    return expert(tokens, self.precision).reshape(x.shape), None


class RoutedAndShared(nn.Module):
  """Sum of a layer of routed experts and an expert that all tokens share.

  Dai et al. 2024 (DeepSeekMoE), sec. 3.2.

  Attributes:
    routed: Factory of the `MoE` layer.
    shared: Factory of the shared expert, a `FeedForward`.
  """

  routed: Callable[[], nn.Module]
  shared: Callable[[], nn.Module]

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: RouterInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    """Returns the sum of both outputs, and the routed layer's report."""
    routed, aux = self.routed()(x, inputs, train=train)
    shared, _ = self.shared()(x, inputs, train=train)
    return routed + shared, aux
