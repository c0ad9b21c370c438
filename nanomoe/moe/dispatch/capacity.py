"""The capacity dispatch: experts with a fixed number of rows."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.interface import dispatch_metrics
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from nanomoe.ops import permute
from trainers.metrics import Mean


def capacity(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
  *,
  capacity_factor: float,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Computes the chosen experts up to their capacity and drops the overflow.

  First choices of all tokens take precedence over second choices, and so on;
  among equal ranks, earlier tokens take precedence. A dropped assignment
  contributes nothing, and the token's other weights are unchanged. Lepikhin et
  al. 2020 (GShard), alg. 1; Fedus et al. 2021 (Switch), eq. 3.

  The dispatch is not causal. A later token's first choice displaces an earlier
  token's second choice, in its own sequence and in others. An output therefore
  depends on the whole batch, in evaluation too.

  Args:
    x: Activations of the tokens.
    routing: Experts and weights of each token.
    experts: Experts of the layer.
    precision: Precision of the experts' products.
    capacity_factor: Rows of an expert over the balanced load.

  Returns:
    The combined output of each token, and metrics by name.
  """
  num_experts = experts.w_in.shape[0]
  num_rows = expert_capacity(routing.expert.size, num_experts, capacity_factor)
  slot = make_slots(routing.expert, num_experts, num_rows)  # [tokens, k]
  num_slots = num_experts * num_rows

  def run_experts(rows):
    y = experts(rows.reshape(num_experts, num_rows, -1), precision)
    return y.reshape(rows.shape)

  assignment_of_slot = permute.invert_slots(slot, num_slots)
  y = permute.apply_permuted(
    run_experts, x, routing.weight, slot, assignment_of_slot
  )
  return y, dispatch_metrics(routing, num_kept=jnp.sum(slot < num_slots))


def expert_capacity(
  num_assignments: int, num_experts: int, capacity_factor: float
) -> int:
  """Returns the rows of an expert: capacity_factor times the balanced load.

  The result is rounded up, and at most the number of all assignments.
  """
  rows = math.ceil(capacity_factor * num_assignments / num_experts)
  return min(rows, num_assignments)


def make_slots(
  expert: Int[Array, 'tokens k'], num_experts: int, num_rows: int
) -> Int[Array, 'tokens k']:
  """Returns the slot of each assignment, `expert * num_rows + rank`.

  An assignment without room, and padding, get `num_experts * num_rows`.

  Args:
    expert: Experts of each token; `num_experts` for padding.
    num_experts: Number of experts.
    num_rows: Rows of an expert.
  """
  by_choice = expert.T.reshape(-1)  # [k * tokens]: all first choices first.
  rank, _ = permute.rank_by_expert(by_choice, num_experts)
  has_room = (by_choice < num_experts) & (rank < num_rows)
  slot = jnp.where(
    has_room, by_choice * num_rows + rank, num_experts * num_rows
  )
  return slot.reshape(expert.T.shape).T
