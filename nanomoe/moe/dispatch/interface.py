"""Interface of a dispatch, and the metrics that every dispatch reports."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from trainers.metrics import Mean


@runtime_checkable
class DispatchFn(Protocol):
  """Function that sends tokens to their experts and combines the outputs.

  A dispatch is pure and local: it sees the rows of one device, and all losses
  and statistics of the routing are computed outside of it.
  """

  def __call__(
    self,
    x: Float[Array, 'tokens d_model'],
    routing: Routing,
    experts: Experts,
    precision: str,
    /,
  ) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
    """Returns `sum_k weight[t, k] * experts[expert[t, k]](x[t])` and metrics.

    Args:
      x: Activations of the tokens.
      routing: Experts and weights of each token. The field `token` is ignored.
      experts: Experts of the layer.
      precision: Precision of the experts' products.

    Returns:
      The combined output of each token, and metrics by name.
    """
    ...


def dispatch_metrics(
  routing: Routing, num_kept: Int[Array, ''] | None = None
) -> dict[str, Mean]:
  """Returns the metrics of a dispatch.

  `dropped_fraction` is the share of assignments that were not computed. Padding
  is no assignment.

  Args:
    routing: Routing of the tokens.
    num_kept: Number of assignments that were computed; None for all.
  """
  load = jnp.sum(routing.load, dtype=jnp.float32)
  dropped = jnp.zeros_like(load) if num_kept is None else load - num_kept
  return {'dropped_fraction': Mean(dropped, load)}
