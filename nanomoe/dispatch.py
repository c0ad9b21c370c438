"""Tokens -> their experts -> tokens: pure, local functions.

Each takes (x, routing, experts, precision) and returns the weighted sum, for
each token, of the outputs of its experts. `dense` is the definition.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe import numerics, pieces
from nanomoe.activations import gelu
from nanomoe.numerics import dot
from nanomoe.routing import Routing

OUTPUT = 'gnf,gfd->gnd'  # The product that ends an expert.


class Experts(NamedTuple):
  """Two-layer GELU networks: [experts, rows, d_model] -> the same shape."""

  w_in: Float[Array, 'experts d_model d_ff']
  b_in: Float[Array, 'experts d_ff']
  w_out: Float[Array, 'experts d_ff d_model']
  b_out: Float[Array, 'experts d_model']

  def __call__(
    self,
    x: Float[Array, 'experts rows d_model'],
    precision: str,
  ) -> Float[Array, 'experts rows d_model']:
    hidden = self.hidden(x, precision)
    return dot(OUTPUT, hidden, self.w_out, precision, self.b_out)

  def hidden(
    self, x: Float[Array, 'experts rows d_model'], precision: str
  ) -> Float[Array, 'experts rows d_ff']:
    return gelu(dot('gnd,gdf->gnf', x, self.w_in, precision, self.b_in))


def dense(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> Float[Array, 'tokens d_model']:
  """Every expert for every token, masked: E / K times the work."""
  num_experts = experts.w_in.shape[0]
  chosen = routing.expert[..., None] == jnp.arange(num_experts)
  weight = jnp.sum(chosen * routing.weight[..., None], axis=1)  # [N, E]
  copies = jnp.broadcast_to(x, (num_experts, *x.shape))
  return jnp.sum(weight.T[..., None] * experts(copies, precision), axis=0)


def dropless(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> Float[Array, 'tokens d_model']:
  """Only the chosen experts; no token is dropped, whatever the loads.

  Assignments are sorted by expert into blocks of equal size; an expert's last
  block is padded. The number of blocks is static and enough for any loads, so
  that the work is N * K rows plus at most a block for each expert. Gale et al.
  2022 (MegaBlocks), sec. 4, with dense blocks.
  """
  num_experts, d_ff, _ = experts.w_out.shape
  plan = make_plan(routing.expert, num_experts, d_ff)
  rows = _permute(x, plan.token_of_slot, plan.slot)
  shape = plan.expert_of_block.shape[0], -1, x.shape[-1]
  y: Any = _run_blocks(
    rows.reshape(shape), experts, plan.expert_of_block, precision
  )
  weight = _permute(
    routing.weight.reshape(-1, 1),
    plan.assignment_of_slot,
    plan.slot.reshape(-1, 1),
  )
  # Not to the hidden layer, which is several times as wide.
  y = weight * y.reshape(rows.shape)
  return _permute(y, plan.slot, plan.token_of_slot[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run_blocks(
  x: Float[Array, 'blocks rows d_model'],
  experts: Experts,
  expert: Int[Array, ' blocks'],
  precision: str,
) -> Float[Array, 'blocks rows d_model']:
  """Each block through its own expert, a few blocks at a time.

  The gradient computes the hidden layer again: on CPUs that costs less than to
  write it to memory and to read it.
  """

  def some(_, blocks):
    x, expert = blocks
    return None, _of(experts, expert)(x, precision)

  _, y = jax.lax.scan(some, None, _at_once((x, expert), x, experts))
  return y.reshape(x.shape)


def _run_blocks_forward(x, experts, expert, precision):
  return _run_blocks(x, experts, expert, precision), (x, experts, expert)


def _run_blocks_backward(precision, residuals, gradient):
  x, experts, expert = residuals

  def some(total, blocks):
    x, expert, gradient = blocks
    run = functools.partial(Experts.hidden, precision=precision)
    own = _of(experts, expert)
    hidden, gradient_of = jax.vjp(run, own, x)
    # By hand: tracing the last product again, if only for its gradient, would
    # count as one more.
    of_hidden, of_w, of_b = numerics.gradients(
      OUTPUT, hidden, own.w_out, gradient, precision
    )
    of_own, of_x = gradient_of(of_hidden)
    of_own = of_own._replace(w_out=of_w, b_out=of_b)
    return jax.tree.map(lambda t, g: t.at[expert].add(g), total, of_own), of_x

  blocks = _at_once((x, expert, gradient), x, experts)
  total = jax.tree.map(jnp.zeros_like, experts)
  of_experts, of_x = jax.lax.scan(some, total, blocks)
  return of_x.reshape(x.shape), of_experts, None


_run_blocks.defvjp(_run_blocks_forward, _run_blocks_backward)


def _of(experts: Experts, expert: Int[Array, ' blocks']) -> Experts:
  return Experts(*(w[expert] for w in experts))


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
    token_of_slot: N if nothing is there.
    assignment_of_slot: token * K + rank of the choice; N * K if nothing.
    expert_of_block: whose rows a block holds.
  """

  slot: Int[Array, 'tokens k']
  token_of_slot: Int[Array, ' slots']
  assignment_of_slot: Int[Array, ' slots']
  expert_of_block: Int[Array, ' blocks']


def block_size(num_assignments: int, num_experts: int) -> int:
  """Rows of a block: an eighth of an even load, to a power of 2 in 8..512.

  Padding is then an eighth of the work at most, for loads of 64 rows or more,
  and products are as large as that allows. A row each where assignments are so
  few that no two need share an expert: what is read of the experts then counts.
  """
  if num_assignments <= num_experts:
    return 1
  eighth = max(num_assignments // (8 * num_experts), 8)
  return min(1 << (eighth.bit_length() - 1), 512)


def make_plan(
  expert: Int[Array, 'tokens k'], num_experts: int, d_ff: int
) -> Plan:
  """Sorts by counting: an assignment's rank is how many came before it."""
  num_tokens, top_k = expert.shape
  num_assignments = num_tokens * top_k
  size = block_size(num_assignments, num_experts)
  # sum_e ceil(n_e / size) is at most this, for all n with sum n_e = N * K.
  num_blocks = (num_assignments + num_experts * (size - 1)) // size
  num_blocks += -num_blocks % _num_at_once(num_blocks, size, d_ff)
  num_slots = num_blocks * size

  flat = expert.reshape(-1)
  chosen = (flat[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
  running = jnp.cumsum(chosen, axis=0)
  blocks = -(-running[-1] // size)  # Of each expert.
  end = jnp.cumsum(blocks)
  first_slot = (end - blocks) * size
  slot = jnp.sum(chosen * (first_slot + running - 1), axis=1)
  slot = jnp.where(flat < num_experts, slot, num_slots)
  assignment_of_slot = (
    jnp.full((num_slots,), num_assignments, jnp.int32)
    .at[slot]
    .set(
      jnp.arange(num_assignments, dtype=jnp.int32),
      mode='drop',
      unique_indices=True,
    )
  )
  expert_of_block = jnp.sum(jnp.arange(num_blocks)[:, None] >= end, axis=1)
  return Plan(
    slot=slot.reshape(expert.shape),
    token_of_slot=assignment_of_slot // top_k,
    assignment_of_slot=assignment_of_slot,
    expert_of_block=jnp.minimum(expert_of_block, num_experts - 1),
  )


@jax.custom_vjp
def _permute(x, index, inverse):
  """y[i] = x[index[i]], summed over a second axis of `index`; 0 past the end.

  `inverse` says where a row of x went, as `index` says where one of y is from;
  so the gradient is a gather too, where a scatter-add would be serial.
  """
  del inverse
  rows = jnp.take(x, index, axis=0, mode='fill', fill_value=0)
  return rows if index.ndim == 1 else rows.sum(axis=1)


def _permute_forward(x, index, inverse):
  return _permute(x, index, inverse), (index, inverse)


def _permute_backward(residuals, g):
  index, inverse = residuals
  return _permute(g, inverse, index), None, None


_permute.defvjp(_permute_forward, _permute_backward)


DISPATCH = {'dense': dense, 'dropless': dropless}


def resolve_dispatch(dispatch: str) -> str:
  """'auto' -> the fastest that drops no token; others as they are."""
  return 'dropless' if dispatch == 'auto' else dispatch
