"""The dropless dispatch: chosen experts alone, whatever the loads."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.interface import dispatch_metrics
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from nanomoe.ops import permute
from trainers.metrics import Mean


def dropless(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Computes the chosen experts alone and drops no token.

  Each expert first computes as many rows as a balanced load has, in one
  batched product, padded where an expert has fewer. Overflow rows follow in
  blocks of one expert, by a loop whose length depends on the loads. Shapes are
  static; the work is not. At worst the rows are twice those of balanced loads,
  plus a block per expert and the padding of the last iteration. The blocks are
  those of Gale et al. 2022 (MegaBlocks), sec. 4.

  Arguments and results are those of `DispatchFn`.
  """
  num_experts = experts.w_in.shape[0]
  plan = make_plan(routing.expert, num_experts)
  y: Any = jnp.zeros_like(x)
  if plan.capacity:

    def run_experts(rows):
      by_expert = rows.reshape(num_experts, plan.capacity, -1)
      return _run_in_chunks(by_expert, experts, precision).reshape(rows.shape)

    y = permute.apply_permuted(
      run_experts, x, routing.weight, plan.slot, plan.assignment_of_slot
    )
  y = _add_overflow(y, x, routing.weight, experts, plan.overflow, precision)
  return y, dispatch_metrics(routing)


# Size of a chunk's intermediate results: about two cores' second-level caches.
CACHE_BYTES = 4 << 20


def chunk_size(expert_bytes: int, num_experts: int) -> int:
  """Returns how many experts to compute at a time, a divisor of `num_experts`.

  On CPUs the intermediate results of a chunk fit the cache: writing them to
  memory and reading them costs more than many a product. Other devices compute
  all experts at a time.

  Args:
    expert_bytes: Size of an expert's intermediate results, in bytes.
    num_experts: Number of experts.
  """
  if jax.default_backend() != 'cpu':
    return num_experts
  largest = min(max(CACHE_BYTES // expert_bytes, 1), num_experts)
  return next(n for n in range(largest, 0, -1) if num_experts % n == 0)


def _run_in_chunks(
  x: Float[Array, 'experts rows d_model'], experts: Experts, precision: str
) -> Float[Array, 'experts rows d_model']:
  """Returns each expert's output for its own rows.

  bfloat16 products run in chunks of experts if the cache does not hold all of
  them, and the gradient computes the hidden layer again. On CPUs recomputing
  costs less than writing the hidden layer to memory and reading it. float32
  products cost several times as much, so their results are kept.
  """
  _, num_rows, _ = x.shape
  num_experts, d_ff, _ = experts.w_out.shape
  count = chunk_size(4 * num_rows * d_ff, num_experts)  # 4 bytes a number.
  if precision == 'float32' or count == num_experts:
    return experts(x, precision)

  @jax.checkpoint
  def run_chunk(experts_and_rows):
    chunk, rows = experts_and_rows
    return chunk(rows, precision)

  chunks = jax.tree.map(
    lambda a: a.reshape(-1, count, *a.shape[1:]), (experts, x)
  )
  return jax.lax.map(run_chunk, chunks).reshape(x.shape)


class Overflow(NamedTuple):
  """Blocks of overflow rows, several blocks per iteration of the loop.

  Attributes:
    num_trips: Number of iterations; later blocks are padding.
    assignment: Assignment of each row, token * K + rank of the choice. The
      value N * K marks an empty row.
    expert: Expert of each block.
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
  """Adds the experts' weighted outputs for the overflow rows to `y`.

  The gradient is written by hand: JAX cannot differentiate a loop of dynamic
  length in reverse.
  """

  def add_blocks(i, y):
    assignment, expert = overflow.assignment[i], overflow.expert[i]
    token = assignment // weight.shape[1]  # [blocks, rows]
    block_experts = experts.take(expert)
    rows = permute.gather_or_zero(x, token)  # [blocks, rows, d_model]
    outputs = block_experts(rows, precision)
    gate = permute.gather_or_zero(weight.reshape(-1), assignment)
    return y.at[token].add(gate[..., None] * outputs, mode='drop')

  return jax.lax.fori_loop(0, overflow.num_trips, add_blocks, y)


def _add_overflow_forward(y, x, weight, experts, overflow, precision):
  y = _add_overflow(y, x, weight, experts, overflow, precision)
  return y, (x, weight, experts, overflow)


def _add_overflow_backward(precision, residuals, y_grad):
  x, weight, experts, overflow = residuals

  def add_blocks(i, grads):
    x_grad, weight_grad, experts_grad = grads
    assignment, expert = overflow.assignment[i], overflow.expert[i]
    token = assignment // weight.shape[1]  # [blocks, rows]
    outputs, vjp = jax.vjp(
      lambda block_experts, rows: block_experts(rows, precision),
      experts.take(expert),
      permute.gather_or_zero(x, token),
    )
    row_grad = permute.gather_or_zero(y_grad, token)
    gate = permute.gather_or_zero(weight.reshape(-1), assignment)
    block_grad, rows_grad = vjp(gate[..., None] * row_grad)
    return (
      x_grad.at[token].add(rows_grad, mode='drop'),
      weight_grad.at[assignment].add(
        jnp.sum(row_grad * outputs, axis=-1), mode='drop'
      ),
      jax.tree.map(
        lambda total, part: total.at[expert].add(part), experts_grad, block_grad
      ),
    )

  zeros = jax.tree.map(jnp.zeros_like, (x, weight.reshape(-1), experts))
  x_grad, weight_grad, experts_grad = jax.lax.fori_loop(
    0, overflow.num_trips, add_blocks, zeros
  )
  return y_grad, x_grad, weight_grad.reshape(weight.shape), experts_grad, None


_add_overflow.defvjp(_add_overflow_forward, _add_overflow_backward)

# Products with fewer rows are slow.
_ROWS_PER_TRIP = 128


class Plan(NamedTuple):
  """Rows of the N * K assignments in `dropless`.

  Attributes:
    capacity: Number of slots of each expert, the balanced load. Slots are
      ordered by expert.
    slot: Slot of each assignment, past the last slot if it has none.
    assignment_of_slot: Assignment of each slot, token * K + rank of the choice.
      The value N * K marks an empty slot.
    overflow: Assignments without a slot.
  """

  capacity: int
  slot: Int[Array, 'tokens k']
  assignment_of_slot: Int[Array, ' slots']
  overflow: Overflow


def plan_sizes(num_assignments: int, num_experts: int) -> tuple[int, int]:
  """Returns the slots of each expert and the rows of an overflow block.

  The rows of a block are a power of 2. If no two assignments need share an
  expert, all of them overflow, one row per block, because reading the experts'
  weights then costs the most.
  """
  if num_assignments <= num_experts:
    return 0, 1
  capacity = -(-num_assignments // num_experts)
  num_rows = min(max(capacity // 4, 8), _ROWS_PER_TRIP, capacity)
  return capacity, 1 << (num_rows.bit_length() - 1)


def make_plan(expert: Int[Array, 'tokens k'], num_experts: int) -> Plan:
  """Assigns a slot, or a row of the overflow, to each assignment.

  Counting replaces sorting: an assignment's rank is the number of earlier
  assignments of the same expert.

  Args:
    expert: Experts of each token; `num_experts` for padding.
    num_experts: Number of experts.
  """
  num_assignments = expert.size
  capacity, block_rows = plan_sizes(num_assignments, num_experts)
  # Upper bound, reached if all assignments have one expert: the blocks are
  # sum_e ceil((n_e - capacity) / block_rows) over experts with n_e > capacity.
  # It holds for all n with sum n_e = N * K, as capacity >= block_rows or
  # block_rows = 1.
  num_blocks = max(
    (num_assignments - capacity + block_rows - 1) // block_rows, 1
  )
  per_trip = min(-(-_ROWS_PER_TRIP // block_rows), num_blocks)
  num_blocks += -num_blocks % per_trip
  num_slots = num_experts * capacity
  num_rows = num_slots + num_blocks * block_rows

  flat = expert.reshape(-1)  # [assignments]
  one_hot, cumsum = permute.one_hot_cumsum(flat, num_experts)
  load = cumsum[-1]  # [experts]
  blocks = -(-jnp.maximum(load - capacity, 0) // block_rows)  # [experts]
  last_block = jnp.cumsum(blocks)
  first_row = num_slots + (last_block - blocks) * block_rows
  rank = cumsum - 1  # [assignments, experts]
  row = jnp.where(
    rank < capacity,
    capacity * jnp.arange(num_experts) + rank,
    first_row + rank - capacity,
  )
  row = jnp.sum(one_hot * row, axis=1)  # [assignments]
  row = jnp.where(flat < num_experts, row, num_rows).reshape(expert.shape)
  assignment_of_row = permute.invert_slots(row, num_rows)
  expert_of_block = jnp.sum(
    jnp.arange(num_blocks)[:, None] >= last_block[:-1], axis=1
  )
  return Plan(
    capacity=capacity,
    slot=row,
    assignment_of_slot=assignment_of_row[:num_slots],
    overflow=Overflow(
      num_trips=-(-last_block[-1] // per_trip),
      assignment=assignment_of_row[num_slots:].reshape(
        -1, per_trip, block_rows
      ),
      expert=expert_of_block.reshape(-1, per_trip),
    ),
  )
