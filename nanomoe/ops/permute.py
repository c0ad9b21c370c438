"""Assignments, N tokens times K choices, to rows sorted by expert, and back.

By counting and by gathers alone, forwards and backwards: on CPUs a sort is a
serial loop, and so is a sum of rows that are scattered.
"""

from collections.abc import Callable
import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def one_hot_cumsum(
  expert: Int[Array, ' assignments'], num_experts: int
) -> tuple[
  Int[Array, 'assignments experts'], Int[Array, 'assignments experts']
]:
  """One-hot rows (zeros for padding, expert E), and their running sums.

  So an assignment's running sum, less one, is its rank within its expert, in
  the order given, and the last row has the experts' loads.
  """
  chosen = (expert[:, None] == jnp.arange(num_experts)).astype(jnp.int32)
  return chosen, jnp.cumsum(chosen, axis=0)


def invert_slots(
  slot: Int[Array, 'tokens k'], num_slots: int
) -> Int[Array, ' {num_slots}']:
  """Which assignment, token * K + choice, a slot has; N * K if none.

  Args:
    slot: of each assignment, all different; num_slots for one that has none.
    num_slots: how many there are.
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
  """sum_k weight[t, k] * run(rows)[slot[t, k]], where rows[slot[t, k]] = x[t].

  A slot that nothing has is a row of zeros, and no token has what becomes of
  it. An assignment without a slot counts as zeros.
  """
  token_of_slot = assignment_of_slot // slot.shape[1]
  y = run(permute(x, token_of_slot, slot))
  weight = permute(
    weight.reshape(-1, 1), assignment_of_slot, slot.reshape(-1, 1)
  )
  # Not to the hidden layer, which is several times as wide.
  return permute(weight * y, slot, token_of_slot[:, None])


@jax.custom_vjp
def permute(x, index, inverse):
  """y[i] = x[index[i]], summed over a second axis of `index`; 0 past the end.

  `inverse` says where a row of x went, as `index` says where one of y is from;
  so the gradient is a gather too, where a scatter-add would be serial.
  """
  del inverse
  if index.ndim == 1:
    return gather_or_zero(x, index)
  # Not a sum over an axis: so XLA gathers and adds in one pass.
  return functools.reduce(operator.add, (gather_or_zero(x, i) for i in index.T))


def gather_or_zero(
  x: Float[Array, 'rows ...'], index: Int[Array, '...']
) -> Float[Array, '...']:
  """x[index]; 0 past the end."""
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


def _permute_forward(x, index, inverse):
  return permute(x, index, inverse), (index, inverse)


def _permute_backward(residuals, g):
  index, inverse = residuals
  return permute(g, inverse, index), None, None


permute.defvjp(_permute_forward, _permute_backward)
