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

from nanomoe import experts as experts_lib
from nanomoe import pieces, slots
from nanomoe.experts import Experts
from nanomoe.routing import Routing
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
  loop that is as long as there are any: shapes are static, the work is
  not. Rows are never more than twice those of even loads and a block for each
  expert. The blocks are those of Gale et al. 2022 (MegaBlocks), sec. 4.
  """
  num_experts = experts.w_in.shape[0]
  plan = make_plan(routing.expert, num_experts)
  y: Any = jnp.zeros_like(x)
  if plan.even:

    def run(rows):
      by_expert = rows.reshape(num_experts, plan.even, -1)
      return _run_even(by_expert, experts, precision).reshape(rows.shape)

    y = slots.through(
      run, x, routing.weight, plan.slot, plan.assignment_of_slot
    )
  y = _add_rest(y, x, routing.weight, experts, plan.rest, precision)
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


def _run_even(
  x: Float[Array, 'experts rows d_model'], experts: Experts, precision: str
) -> Float[Array, 'experts rows d_model']:
  """Each expert's rows through it.

  Of bfloat16 products a few experts at a time, and the gradient computes the
  hidden layer again: on CPUs that costs less than to write it to memory and to
  read it. Float32 products cost several times as much: what they gave is kept.
  """
  if precision == 'float32':
    return experts(x, precision)
  _, size, _ = x.shape
  num_experts, d_ff, _ = experts.w_out.shape
  count = pieces.at_once(4 * size * d_ff, num_experts)

  @jax.checkpoint
  def some(experts_and_rows):
    own, rows = experts_and_rows
    return own(rows, precision)

  split = jax.tree.map(
    lambda a: a.reshape(-1, count, *a.shape[1:]), (experts, x)
  )
  return jax.lax.map(some, split).reshape(x.shape)


class Rest(NamedTuple):
  """Blocks of assignments, each of one expert, some of them at a time.

  Attributes:
    num_times: how often there are some; what follows is padding.
    assignment: token * K + rank of the choice; N * K if nothing.
    expert: whose a block is.
  """

  num_times: Int[Array, '']
  assignment: Int[Array, 'times blocks rows']
  expert: Int[Array, 'times blocks']


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _add_rest(
  y: Float[Array, 'tokens d_model'],
  x: Float[Array, 'tokens d_model'],
  weight: Float[Array, 'tokens k'],
  experts: Experts,
  rest: Rest,
  precision: str,
) -> Float[Array, 'tokens d_model']:
  """y, and what the experts add to it for the rest.

  With a gradient by hand: JAX has none of a loop whose length is not static.
  """
  rounded = experts.rounded(precision)  # Once, not for each block anew.

  def add(i, y):
    assignment, own = rest.assignment[i], rounded.of(rest.expert[i])
    token = assignment // weight.shape[1]
    of_token = own(slots.take(x, token), precision)
    gate = slots.take(weight.reshape(-1), assignment)
    return y.at[token].add(gate[..., None] * of_token, mode='drop')

  return jax.lax.fori_loop(0, rest.num_times, add, y)


def _add_rest_forward(y, x, weight, experts, rest, precision):
  y = _add_rest(y, x, weight, experts, rest, precision)
  return y, (x, weight, experts, rest)


def _add_rest_backward(precision, residuals, of_y):
  x, weight, experts, rest = residuals
  rounded = experts.rounded(precision)
  product = functools.partial(experts_lib.product, precision=precision)

  def add(i, total):
    of_x, of_weight, of_experts = total
    assignment, expert = rest.assignment[i], rest.expert[i]
    token = assignment // weight.shape[1]
    own, rows = rounded.of(expert), slots.take(x, token)
    g = slots.take(of_y, token)
    gate = slots.take(weight.reshape(-1), assignment)
    before = own.before(rows, product)
    of_gate = jnp.sum(g * own.after(before, product), axis=-1)
    of_rows, of_own = own.gradients(
      rows, before, gate[..., None] * g, precision
    )
    return (
      of_x.at[token].add(of_rows, mode='drop'),
      of_weight.at[assignment].add(of_gate, mode='drop'),
      jax.tree.map(lambda t, m: t.at[expert].add(m), of_experts, of_own),
    )

  zeros = jax.tree.map(jnp.zeros_like, (x, weight.reshape(-1), experts))
  of_x, of_weight, of_experts = jax.lax.fori_loop(0, rest.num_times, add, zeros)
  return of_y, of_x, of_weight.reshape(weight.shape), of_experts, None


_add_rest.defvjp(_add_rest_forward, _add_rest_backward)

# Rows of the rest at a time: with fewer, products are slow.
_ROWS_AT_A_TIME = 128


class Plan(NamedTuple):
  """Where `dropless` puts N * K assignments.

  Attributes:
    even: rows of each expert, in order, which are slots.
    slot: of an assignment; past the last for those of the rest and padding.
    assignment_of_slot: token * K + rank of the choice; N * K if nothing.
    rest: the others.
  """

  even: int
  slot: Int[Array, 'tokens k']
  assignment_of_slot: Int[Array, ' slots']
  rest: Rest


def sizes(num_assignments: int, num_experts: int) -> tuple[int, int]:
  """Rows of each expert, and of a block of the rest: a power of 2.

  All are the rest, a row each, where assignments are so few that no two need
  share an expert: what is read of the experts then counts.
  """
  if num_assignments <= num_experts:
    return 0, 1
  even = -(-num_assignments // num_experts)
  size = min(max(even // 4, 8), _ROWS_AT_A_TIME, even)
  return even, 1 << (size.bit_length() - 1)


def make_plan(expert: Int[Array, 'tokens k'], num_experts: int) -> Plan:
  """Sorts by counting: an assignment's rank is how many came before it."""
  num_assignments = expert.size
  even, size = sizes(num_assignments, num_experts)
  # Most, where all have one expert: sum_e ceil((n_e - even) / size), for
  # n_e > even, is at most this for all n with sum n_e = N * K, as even >= size
  # or size = 1.
  num_blocks = max((num_assignments - even + size - 1) // size, 1)
  at_a_time = min(-(-_ROWS_AT_A_TIME // size), num_blocks)
  num_blocks += -num_blocks % at_a_time
  num_even = num_experts * even
  num_slots = num_even + num_blocks * size

  flat = expert.reshape(-1)
  chosen, running = slots.count_up(flat, num_experts)
  blocks = -(-jnp.maximum(running[-1] - even, 0) // size)  # Of each expert.
  end = jnp.cumsum(blocks)
  first = num_even + (end - blocks) * size
  rank = running - 1
  own = jnp.where(
    rank < even, even * jnp.arange(num_experts) + rank, first + rank - even
  )
  slot = jnp.sum(chosen * own, axis=1)
  slot = jnp.where(flat < num_experts, slot, num_slots).reshape(expert.shape)
  filled = slots.filled(slot, num_slots)
  expert_of_block = jnp.sum(jnp.arange(num_blocks)[:, None] >= end[:-1], axis=1)
  return Plan(
    even=even,
    slot=slot,
    assignment_of_slot=filled[:num_even],
    rest=Rest(
      num_times=-(-end[-1] // at_a_time),
      assignment=filled[num_even:].reshape(-1, at_a_time, size),
      expert=expert_of_block.reshape(-1, at_a_time),
    ),
  )
