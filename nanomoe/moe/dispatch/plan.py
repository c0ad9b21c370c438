"""Plan of the dropless dispatch: the row of each assignment."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from nanomoe.ops import permute

# Products with fewer rows are slow.
_ROWS_PER_TRIP = 256


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


class Plan(NamedTuple):
  """Rows of the N * K assignments in `dropless`.

  Attributes:
    slot: Slot of each assignment, past the last slot if it has none. Slot
      `e * capacity + i` is the i-th of expert e.
    assignment_of_slot: Assignment of each slot, token * K + rank of the choice,
      as rows of the balanced load. The value N * K marks an empty slot.
    overflow: Assignments without a slot.
  """

  slot: Int[Array, 'tokens k']
  assignment_of_slot: Int[Array, 'experts capacity']
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


def make_plan(
  expert: Int[Array, 'tokens k'],
  num_experts: int,
  num_expected: int | None = None,
) -> Plan:
  """Assigns a slot, or a row of the overflow, to each assignment.

  Args:
    expert: Experts of each token; `num_experts` for padding.
    num_experts: Number of experts.
    num_expected: Number of assignments that are not padding if loads are
      balanced; None for all.
  """
  num_assignments = expert.size
  capacity, block_rows = plan_sizes(
    num_expected or num_assignments, num_experts
  )
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
  rank, load = permute.rank_by_expert(flat, num_experts)
  blocks = -(-jnp.maximum(load - capacity, 0) // block_rows)  # [experts]
  last_block = jnp.cumsum(blocks)
  first_row = num_slots + (last_block - blocks) * block_rows
  row = jnp.where(
    rank < capacity,
    capacity * flat + rank,
    permute.gather_or_zero(first_row, flat) + rank - capacity,
  )  # [assignments]
  row = jnp.where(flat < num_experts, row, num_rows).reshape(expert.shape)
  assignment_of_row = permute.invert_slots(row, num_rows)
  expert_of_block = jnp.sum(
    jnp.arange(num_blocks)[:, None] >= last_block[:-1], axis=1
  )
  return Plan(
    slot=row,
    assignment_of_slot=assignment_of_row[:num_slots].reshape(num_experts, -1),
    overflow=Overflow(
      num_trips=-(-last_block[-1] // per_trip),
      assignment=assignment_of_row[num_slots:].reshape(
        -1, per_trip, block_rows
      ),
      expert=expert_of_block.reshape(-1, per_trip),
    ),
  )
