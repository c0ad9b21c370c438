"""The grouped dispatch: products over groups of rows of unequal size."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.interface import dispatch_metrics
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from nanomoe.ops import matmul, permute
from trainers.metrics import Mean


def grouped(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Computes the chosen experts without padding and drops no token.

  Assignments are sorted by expert, and `jax.lax.ragged_dot` multiplies each
  expert's rows by the expert's own weights. Gale et al. 2022 (MegaBlocks),
  sec. 4.

  The dispatch is meant for GPUs and was checked on CPUs alone. XLA on a CPU
  computes all rows for each expert and masks them, which is slow. XLA on a GPU
  does the same if no kernel supports the product, so look at the compiled
  program before timing it.

  Arguments and results are those of `DispatchFn`.
  """
  num_experts = experts.w_in.shape[0]
  slot, sizes = make_groups(routing.expert, num_experts)
  product = functools.partial(
    matmul.ragged_dot, sizes=sizes, precision=precision
  )
  run_experts = functools.partial(experts.apply, product)
  assignment_of_slot = permute.invert_slots(slot, slot.size)
  y = permute.apply_permuted(
    run_experts, x, routing.weight, slot, assignment_of_slot
  )
  return y, dispatch_metrics(routing)


def make_groups(
  expert: Int[Array, 'tokens k'], num_experts: int
) -> tuple[Int[Array, 'tokens k'], Int[Array, ' experts']]:
  """Sorts assignments by expert.

  Rows left over by padding are zeros and belong to the last expert, because
  platforms differ in the product of rows that belong to no group.

  Args:
    expert: Experts of each token; `num_experts` for padding.
    num_experts: Number of experts.

  Returns:
    The row of each assignment, one past the last row for padding, and the
    number of rows of each expert.
  """
  flat = expert.reshape(-1)  # [assignments]
  rank, load = permute.rank_by_expert(flat, num_experts)
  end = jnp.cumsum(load)
  slot = permute.gather_or_zero(end - load, flat) + rank  # [assignments]
  slot = jnp.where(flat < num_experts, slot, flat.size)
  is_last = jnp.arange(num_experts) == num_experts - 1
  sizes = load + is_last * (flat.size - end[-1])
  return slot.reshape(expert.shape), sizes
