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

  Assignments are sorted by expert into blocks of equal size; an expert's last
  block is padded. The number of blocks is static and enough for any loads, so
  that the work is N * K rows plus at most a block for each expert. Gale et al.
  2022 (MegaBlocks), sec. 4, with dense blocks.
  """
  num_experts, d_ff, _ = experts.w_out.shape
  plan = make_plan(routing.expert, num_experts, d_ff)
  num_blocks = len(plan.expert_of_block)

  def run(rows):
    blocks = rows.reshape(num_blocks, -1, rows.shape[-1])
    y: Any = _run_blocks(blocks, experts, plan.expert_of_block, precision)
    return y.reshape(rows.shape)

  y = slots.through(run, x, routing.weight, plan.slot, plan.assignment_of_slot)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run_blocks(
  x: Float[Array, 'blocks rows d_model'],
  experts: Experts,
  expert: Int[Array, ' blocks'],
  precision: str,
) -> Float[Array, 'blocks rows d_model']:
  """Each block through its own expert, a few blocks at a time.

  Of bfloat16 products the gradient computes the hidden layer again: on CPUs
  that costs less than to write it to memory and to read it. Float32 products
  cost several times as much: what they gave is kept.
  """
  return _run(x, experts, expert, precision)[0]


def _run(x, experts, expert, precision: str, keep: bool = False):
  rounded = experts.rounded(precision)  # Once, not for each block anew.
  product = functools.partial(experts_lib.product, precision=precision)

  def some(_, blocks):
    x, expert = blocks
    own = rounded.of(expert)
    before = own.before(x, product)
    return None, (own.after(before, product), before if keep else None)

  _, (y, kept) = jax.lax.scan(some, None, _at_once((x, expert), x, experts))
  return y.reshape(x.shape), kept


def _run_blocks_forward(x, experts, expert, precision):
  y, before = _run(x, experts, expert, precision, keep=precision == 'float32')
  return y, (x, experts, expert, before)


def _run_blocks_backward(precision, residuals, gradient):
  x, experts, expert, kept = residuals
  rounded = experts.rounded(precision)
  product = functools.partial(experts_lib.product, precision=precision)

  def some(total, blocks):
    (x, expert, gradient), before = blocks
    own = rounded.of(expert)
    if before is None:
      before = own.before(x, product)
    of_x, more = own.gradients(x, before, gradient, precision)
    return jax.tree.map(lambda t, m: t.at[expert].add(m), total, more), of_x

  blocks = _at_once((x, expert, gradient), x, experts)
  total = jax.tree.map(jnp.zeros_like, experts)
  of_experts, of_x = jax.lax.scan(some, total, (blocks, kept))
  return of_x.reshape(x.shape), of_experts, None


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)


def _at_once(tree: Any, x: jax.Array, experts: Experts) -> Any:
  """Splits the first axis, of x's blocks, into those to compute at once."""
  num_blocks, size, _ = x.shape
  count = _num_at_once(num_blocks, size, experts.w_out.shape[1])
  return jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:]), tree)


def _num_at_once(num_blocks: int, size: int, d_ff: int) -> int:
  return pieces.at_once(4 * size * d_ff, num_blocks)


class Plan(NamedTuple):
  """Where `dropless` puts N * K assignments; slots are rows of blocks.

  Attributes:
    slot: of an assignment; one past the last for padding.
    assignment_of_slot: token * K + rank of the choice; N * K if nothing.
    expert_of_block: whose rows a block holds.
  """

  slot: Int[Array, 'tokens k']
  assignment_of_slot: Int[Array, ' slots']
  expert_of_block: Int[Array, ' blocks']


def block_size(num_assignments: int, num_experts: int) -> int:
  """Rows of a block, a power of 2 in 8..512: a quarter of an even load to 256.

  Of large loads an eighth. Padding is a block for each expert at most: a fourth
  or an eighth of the work. But every block reads its expert's weights, and its
  backward pass writes them: with half as many rows that takes as long as the
  padding of a block. A row each where assignments are so few that no two need
  share an expert: what is read of the experts then counts.
  """
  if num_assignments <= num_experts:
    return 1
  load = num_assignments // num_experts
  size = max(load // 8, min(load // 4, 256), 8)
  return min(1 << (size.bit_length() - 1), 512)


def make_plan(
  expert: Int[Array, 'tokens k'], num_experts: int, d_ff: int
) -> Plan:
  """Sorts by counting: an assignment's rank is how many came before it."""
  num_assignments = expert.size
  size = block_size(num_assignments, num_experts)
  # sum_e ceil(n_e / size) is at most this, for all n with sum n_e = N * K.
  num_blocks = (num_assignments + num_experts * (size - 1)) // size
  num_blocks += -num_blocks % _num_at_once(num_blocks, size, d_ff)
  num_slots = num_blocks * size

  flat = expert.reshape(-1)
  chosen, running = slots.count_up(flat, num_experts)
  blocks = -(-running[-1] // size)  # Of each expert.
  end = jnp.cumsum(blocks)
  first_slot = (end - blocks) * size
  slot = jnp.sum(chosen * (first_slot + running - 1), axis=1)
  slot = jnp.where(flat < num_experts, slot, num_slots)
  expert_of_block = jnp.sum(jnp.arange(num_blocks)[:, None] >= end, axis=1)
  slot = slot.reshape(expert.shape)
  return Plan(
    slot=slot,
    assignment_of_slot=slots.filled(slot, num_slots),
    expert_of_block=jnp.minimum(expert_of_block, num_experts - 1),
  )
