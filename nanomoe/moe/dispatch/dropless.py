"""Tokens -> their experts -> tokens: pure, local functions.

Each takes (x, routing, experts, precision) and returns the weighted sum, for
each token, of the outputs of its experts, and metrics. `dense` is the
definition; `dispatchers.DISPATCH` has all of them by name.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch import pieces
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from nanomoe.ops import permute
from trainers.metrics import Mean


def dense(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Every expert for every token, masked: E / K times the work."""
  num_experts = experts.w_in.shape[0]
  chosen = routing.expert[..., None] == jnp.arange(num_experts)
  weight = jnp.sum(chosen * routing.weight[..., None], axis=1)  # [N, E]
  copies = jnp.broadcast_to(x, (num_experts, *x.shape))
  y = jnp.sum(weight.T[..., None] * experts(copies, precision), axis=0)
  return y, report(routing)


def dropless(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Only the chosen experts; no token is dropped, whatever the loads.

  Each expert first computes as many rows as an even load has, all in one
  product, with padding where fewer came. What is over follows in blocks, by a
  loop that is as long as there are any: shapes are static, the work is not.
  Rows are at most twice those of even loads, a block for each expert, and what
  fills the last trip. The blocks are those of Gale et al. 2022 (MegaBlocks),
  sec. 4.
  """
  num_experts = experts.w_in.shape[0]
  plan = make_plan(routing.expert, num_experts)
  y: Any = jnp.zeros_like(x)
  if plan.capacity:

    def run(rows):
      by_expert = rows.reshape(num_experts, plan.capacity, -1)
      return _run_all(by_expert, experts, precision).reshape(rows.shape)

    y = permute.apply_permuted(
      run, x, routing.weight, plan.slot, plan.assignment_of_slot
    )
  y = _add_overflow(y, x, routing.weight, experts, plan.overflow, precision)
  return y, report(routing)


def report(
  routing: Routing, num_kept: Int[Array, ''] | None = None
) -> dict[str, Mean]:
  """Metrics of a dispatch that computed so many assignments; None: all.

  dropped_fraction: of the assignments, without padding's.
  """
  load = jnp.sum(routing.load, dtype=jnp.float32)
  dropped = jnp.zeros_like(load) if num_kept is None else load - num_kept
  return {'dropped_fraction': Mean(dropped, load)}


def _run_all(
  x: Float[Array, 'experts rows d_model'], experts: Experts, precision: str
) -> Float[Array, 'experts rows d_model']:
  """Each expert's rows through it.

  Of bfloat16 products as many experts at a time as the cache holds, if it does
  not hold all, and the gradient computes the hidden layer again: on CPUs that
  costs less than to write it to memory and to read it. Float32 products cost
  several times as much: what they gave is kept.
  """
  _, size, _ = x.shape
  num_experts, d_ff, _ = experts.w_out.shape
  count = pieces.at_once(4 * size * d_ff, num_experts)
  if precision == 'float32' or count == num_experts:
    return experts(x, precision)

  @jax.checkpoint
  def some(experts_and_rows):
    own, rows = experts_and_rows
    return own(rows, precision)

  split = jax.tree.map(
    lambda a: a.reshape(-1, count, *a.shape[1:]), (experts, x)
  )
  return jax.lax.map(some, split).reshape(x.shape)


class Overflow(NamedTuple):
  """Blocks of assignments, each of one expert, some of them in a trip.

  Attributes:
    num_trips: of the loop over them; what follows is padding.
    assignment: token * K + rank of the choice; N * K if nothing.
    expert: whose a block is.
  """

  num_trips: Int[Array, '']
  assignment: Int[Array, 'trips blocks rows']
  expert: Int[Array, 'trips blocks']


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _add_overflow(
  y: Float[Array, 'tokens d_model'],
  x: Float[Array, 'tokens d_model'],
  weight: Float[Array, 'tokens k'],
  experts: Experts,
  overflow: Overflow,
  precision: str,
) -> Float[Array, 'tokens d_model']:
  """y, and what the experts add to it for what is over their capacity.

  With a gradient of its own: JAX has none of a loop whose length is not static.
  """

  def add(i, y):
    assignment, expert = overflow.assignment[i], overflow.expert[i]
    token = assignment // weight.shape[1]
    of_token = experts.take(expert)(permute.gather_or_zero(x, token), precision)
    gate = permute.gather_or_zero(weight.reshape(-1), assignment)
    return y.at[token].add(gate[..., None] * of_token, mode='drop')

  return jax.lax.fori_loop(0, overflow.num_trips, add, y)


def _add_overflow_forward(y, x, weight, experts, overflow, precision):
  y = _add_overflow(y, x, weight, experts, overflow, precision)
  return y, (x, weight, experts, overflow)


def _add_overflow_backward(precision, residuals, of_y):
  x, weight, experts, overflow = residuals

  def add(i, total):
    of_x, of_weight, of_experts = total
    assignment, expert = overflow.assignment[i], overflow.expert[i]
    token = assignment // weight.shape[1]
    y, gradients = jax.vjp(
      lambda own, rows: own(rows, precision),
      experts.take(expert),
      permute.gather_or_zero(x, token),
    )
    g = permute.gather_or_zero(of_y, token)
    gate = permute.gather_or_zero(weight.reshape(-1), assignment)
    of_own, of_rows = gradients(gate[..., None] * g)
    return (
      of_x.at[token].add(of_rows, mode='drop'),
      of_weight.at[assignment].add(jnp.sum(g * y, axis=-1), mode='drop'),
      jax.tree.map(lambda t, m: t.at[expert].add(m), of_experts, of_own),
    )

  zeros = jax.tree.map(jnp.zeros_like, (x, weight.reshape(-1), experts))
  of_x, of_weight, of_experts = jax.lax.fori_loop(
    0, overflow.num_trips, add, zeros
  )
  return of_y, of_x, of_weight.reshape(weight.shape), of_experts, None


_add_overflow.defvjp(_add_overflow_forward, _add_overflow_backward)

# With fewer, products are slow.
_ROWS_PER_TRIP = 128


class Plan(NamedTuple):
  """Where `dropless` puts N * K assignments.

  Attributes:
    capacity: slots of each expert, in order: as many as an even load has.
    slot: of an assignment; past the last if it has none.
    assignment_of_slot: token * K + rank of the choice; N * K if nothing.
    overflow: those that came when their expert had no slot left.
  """

  capacity: int
  slot: Int[Array, 'tokens k']
  assignment_of_slot: Int[Array, ' slots']
  overflow: Overflow


def sizes(num_assignments: int, num_experts: int) -> tuple[int, int]:
  """Slots of each expert, and rows of a block of the overflow, a power of 2.

  All overflow, a row each, where assignments are so few that no two need share
  an expert: what is read of the experts then counts.
  """
  if num_assignments <= num_experts:
    return 0, 1
  capacity = -(-num_assignments // num_experts)
  size = min(max(capacity // 4, 8), _ROWS_PER_TRIP, capacity)
  return capacity, 1 << (size.bit_length() - 1)


def make_plan(expert: Int[Array, 'tokens k'], num_experts: int) -> Plan:
  """Sorts by counting: an assignment's rank is how many came before it."""
  num_assignments = expert.size
  capacity, size = sizes(num_assignments, num_experts)
  # Most, where all have one expert: sum_e ceil((n_e - capacity) / size), for
  # n_e > capacity, is at most this for all n with sum n_e = N * K, as
  # capacity >= size or size = 1.
  num_blocks = max((num_assignments - capacity + size - 1) // size, 1)
  per_trip = min(-(-_ROWS_PER_TRIP // size), num_blocks)
  num_blocks += -num_blocks % per_trip
  num_slots = num_experts * capacity
  num_rows = num_slots + num_blocks * size

  flat = expert.reshape(-1)
  chosen, running = permute.one_hot_cumsum(flat, num_experts)
  blocks = -(-jnp.maximum(running[-1] - capacity, 0) // size)  # Of each expert.
  end = jnp.cumsum(blocks)
  first = num_slots + (end - blocks) * size
  rank = running - 1
  row = jnp.where(
    rank < capacity,
    capacity * jnp.arange(num_experts) + rank,
    first + rank - capacity,
  )
  row = jnp.sum(chosen * row, axis=1)
  row = jnp.where(flat < num_experts, row, num_rows).reshape(expert.shape)
  filled = permute.invert_slots(row, num_rows)
  expert_of_block = jnp.sum(jnp.arange(num_blocks)[:, None] >= end[:-1], axis=1)
  return Plan(
    capacity=capacity,
    slot=row,
    assignment_of_slot=filled[:num_slots],
    overflow=Overflow(
      num_trips=-(-end[-1] // per_trip),
      assignment=filled[num_slots:].reshape(-1, per_trip, size),
      expert=expert_of_block.reshape(-1, per_trip),
    ),
  )
