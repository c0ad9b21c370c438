"""Dispatch to experts that have room for so many rows, and no more."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.dropless import report
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
  """The chosen experts, as long as they have room: the rest is dropped.

  An expert has `room` rows. First choices of all tokens come before second
  ones, and so on, and of equal rank those of earlier tokens. What is dropped
  contributes nothing, and the token's other weights stay as they are. Lepikhin
  et al. 2020 (GShard), alg. 1; Fedus et al. 2021 (Switch), eq. 3.

  Not causal: where assignments are dropped, a later token's first choice
  displaces an earlier token's second, in its own sequence and in others of the
  batch. So what a token gets depends on the whole batch, in evaluation too.
  """
  num_experts = experts.w_in.shape[0]
  size = room(routing.expert.size, num_experts, capacity_factor)
  slot = make_slots(routing.expert, num_experts, size)
  num_slots = num_experts * size

  def run(rows):
    y = experts(rows.reshape(num_experts, size, -1), precision)
    return y.reshape(rows.shape)

  filled = permute.invert_slots(slot, num_slots)
  y = permute.apply_permuted(run, x, routing.weight, slot, filled)
  return y, report(routing, num_kept=jnp.sum(slot < num_slots))


def room(num_assignments: int, num_experts: int, capacity_factor: float) -> int:
  """Rows of an expert: capacity_factor times an even load, rounded up.

  Never more than all assignments, whatever the factor.
  """
  rows = math.ceil(capacity_factor * num_assignments / num_experts)
  return min(rows, num_assignments)


def make_slots(
  expert: Int[Array, 'tokens k'], num_experts: int, size: int
) -> Int[Array, 'tokens k']:
  """Row `expert * size + rank`; one past the last if there is no room."""
  by_choice = expert.T.reshape(-1)
  chosen, running = permute.one_hot_cumsum(by_choice, num_experts)
  rank = jnp.sum(chosen * running, axis=1) - 1
  has_room = (by_choice < num_experts) & (rank < size)
  slot = jnp.where(has_room, by_choice * size + rank, num_experts * size)
  return slot.reshape(expert.T.shape).T
