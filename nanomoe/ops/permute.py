"""Permutation of N tokens times K choices to rows sorted by expert, and back.

Counting and gathers suffice, in the gradient too. Sorts, and scatter-adds of
rows, would be serial loops on CPUs.
"""

from collections.abc import Callable
import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

# Assignments in a block of `rank_by_expert`.
_BLOCK = 32


def rank_by_expert(
  expert: Int[Array, ' assignments'], num_experts: int
) -> tuple[Int[Array, ' assignments'], Int[Array, ' experts']]:
  """Returns the rank of each assignment within its expert, and the loads.

  The rank is the number of earlier assignments of the same expert. Counting has
  two levels: within blocks of assignments by comparing all pairs, then over
  blocks by a cumulative sum of their loads. The work is proportional to the
  number of assignments, where a cumulative sum of one-hot rows is proportional
  to assignments times experts, and a sort is serial on CPUs.

  Args:
    expert: Expert of each assignment; `num_experts` marks padding, whose rank
      has no meaning.
    num_experts: Number of experts.
  """
  padded = jnp.pad(
    expert, (0, -expert.size % _BLOCK), constant_values=num_experts
  ).reshape(-1, _BLOCK)  # [blocks, block]
  # Element [b, i, j]: assignment i precedes assignment j of the same expert.
  precedes = padded[:, :, None] == padded[:, None, :]
  precedes &= jnp.triu(jnp.ones((_BLOCK, _BLOCK), bool), 1)
  rank = jnp.sum(precedes, axis=1, dtype=jnp.int32)  # [blocks, block]
  block = jnp.arange(len(padded))[:, None]
  load = jnp.zeros((len(padded), num_experts), jnp.int32)
  load = load.at[block, padded].add(1, mode='drop')  # [blocks, experts]
  total = jnp.cumsum(load, axis=0)
  before = (total - load).at[block, padded].get(mode='fill', fill_value=0)
  return (rank + before).reshape(-1)[: expert.size], total[-1]


def invert_slots(
  slot: Int[Array, 'tokens k'], num_slots: int
) -> Int[Array, ' {num_slots}']:
  """Returns the assignment in each slot, `token * K + choice`.

  Args:
    slot: Slot of each assignment, all of them different; `num_slots` marks an
      assignment without a slot.
    num_slots: Number of slots.

  Returns:
    The assignments; N * K marks an empty slot.
  """
  return (
    jnp.full((num_slots,), slot.size, jnp.int32)
    .at[slot.reshape(-1)]
    .set(
      jnp.arange(slot.size, dtype=jnp.int32), mode='drop', unique_indices=True
    )
  )


def apply_permuted(
  run: Callable[[jax.Array], jax.Array],
  x: Float[Array, 'tokens d_model'],
  weight: Float[Array, 'tokens k'],
  slot: Int[Array, 'tokens k'],
  assignment_of_slot: Int[Array, ' slots'],
) -> Float[Array, 'tokens d_model']:
  """Applies a function to rows by slot, and combines its results by token.

  Returns `sum_k weight[t, k] * run(rows)[slot[t, k]]` for each token t, where
  `rows[slot[t, k]] = x[t]`. An empty slot is a row of zeros, whose result is
  not read. An assignment without a slot counts as zeros.

  Args:
    run: Function of rows by slot, `[slots, d_model]`.
    x: Activations of the tokens.
    weight: Weight of each assignment.
    slot: Slot of each assignment, as in `invert_slots`.
    assignment_of_slot: Result of `invert_slots`.
  """
  token_of_slot = assignment_of_slot // slot.shape[1]
  y = run(permute(x, token_of_slot, slot))
  weight = permute(
    weight.reshape(-1, 1), assignment_of_slot, slot.reshape(-1, 1)
  )
  # The hidden layer is several times as wide, so weights multiply the output.
  return permute(weight * y, slot, token_of_slot[:, None])


@jax.custom_vjp
def permute(x, index, inverse):
  """Returns `y[i] = x[index[i]]`, summed over a second axis of `index`.

  The gradient is a gather too, by the inverse index. A scatter-add would be
  serial.

  Args:
    x: Rows.
    index: Row of x for each row of y; an index past the end stands for zeros.
    inverse: Rows of y that each row of x went to, in the format of `index`.
  """
  del inverse
  return gather_or_zero(x, index) if index.ndim == 1 else sum_rows(x, index)


def sum_rows(
  x: Float[Array, 'rows d'],
  index: Int[Array, 'tokens k'],
  weight: Float[Array, 'tokens k'] | None = None,
) -> Float[Array, 'tokens d']:
  """Returns `sum_k weight[t, k] * x[index[t, k]]` for each token t.

  Args:
    x: Rows.
    index: Indices of rows; an index past the end stands for zeros.
    weight: Weights, or None for 1.
  """

  def row_of_choice(k):
    row = gather_or_zero(x, index[:, k])  # [tokens, d]
    return row if weight is None else weight[:, k, None] * row

  # XLA fuses these additions with the gathers, but not a sum over an axis.
  return functools.reduce(
    operator.add, map(row_of_choice, range(index.shape[1]))
  )


def gather_or_zero(
  x: Shaped[Array, 'rows ...'], index: Int[Array, '...']
) -> Shaped[Array, '...']:
  """Returns `x[index]`, with zeros for an index past the end.

  Args:
    x: Rows.
    index: Indices of rows.
  """
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


def _permute_forward(x, index, inverse):
  return permute(x, index, inverse), (index, inverse)


def _permute_backward(residuals, g):
  index, inverse = residuals
  return permute(g, inverse, index), None, None


permute.defvjp(_permute_forward, _permute_backward)
