"""Dispatch by products over groups of rows of unequal size."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.dropless import report
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
  """Only the chosen experts, without padding; no token is dropped.

  Assignments are sorted by expert, and `jax.lax.ragged_dot` multiplies each
  expert's rows by its own weights. Gale et al. 2022 (MegaBlocks), sec. 4.

  Meant for GPUs, and checked on CPUs only, where it is slow: XLA computes all
  rows for each expert there, and masks them. On a GPU too it may, where no
  kernel takes the product: look at the compiled program before timing it.
  """
  num_experts = experts.w_in.shape[0]
  slot, sizes = make_groups(routing.expert, num_experts)
  product = functools.partial(
    matmul.ragged_dot, sizes=sizes, precision=precision
  )
  run = functools.partial(experts.apply, product)
  filled = permute.invert_slots(slot, slot.size)
  y = permute.apply_permuted(run, x, routing.weight, slot, filled)
  return y, report(routing)


def make_groups(
  expert: Int[Array, 'tokens k'], num_experts: int
) -> tuple[Int[Array, 'tokens k'], Int[Array, ' experts']]:
  """Each assignment's row, one past the last for padding; rows per expert.

  Rows left over by padding, zeros, are the last expert's: what a product makes
  of rows in no group is not the same everywhere.
  """
  flat = expert.reshape(-1)
  chosen, running = permute.one_hot_cumsum(flat, num_experts)
  end = jnp.cumsum(running[-1])
  slot = jnp.sum(chosen * (end - running[-1] + running - 1), axis=1)
  slot = jnp.where(flat < num_experts, slot, flat.size)
  last = jnp.arange(num_experts) == num_experts - 1
  sizes = running[-1] + last * (flat.size - end[-1])
  return slot.reshape(expert.shape), sizes
