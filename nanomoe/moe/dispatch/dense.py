"""The dense dispatch, which defines what every other dispatch computes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from nanomoe.moe.dispatch.interface import dispatch_metrics
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from trainers.metrics import Mean


def dense(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Computes every expert for every token and masks the outputs.

  The experts cost E / K times the work of a sparse dispatch. Arguments and
  results are those of `DispatchFn`.
  """
  num_experts = experts.w_in.shape[0]
  one_hot = routing.expert[..., None] == jnp.arange(num_experts)
  weight = jnp.sum(one_hot * routing.weight[..., None], axis=1)  # [N, E]
  copies = jnp.broadcast_to(x, (num_experts, *x.shape))  # [E, N, d_model]
  y = jnp.sum(weight.T[..., None] * experts(copies, precision), axis=0)
  return y, dispatch_metrics(routing)
