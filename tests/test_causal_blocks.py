"""Attention by blocks of rows, against the textbook attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.attention import attend
from nanomoe.ops.causal_blocks import NUM_BLOCKS, attend_by_blocks
from tests.shrunk import mostly_slow

pytestmark = pytest.mark.optimized


def _attend_by_blocks(q, k, v, key=None, dropout_rate=0.0):
  return attend_by_blocks(
    attend, q, k, v, key, dropout_rate=dropout_rate, precision='float32'
  )


@pytest.mark.parametrize('time', mostly_slow([1, 3, 6, 9], 3))
def test_value_and_gradients_equal_the_textbook(time, rng):
  q, k, v, up = jnp.asarray(rng.normal(size=(4, 2, 3, time, 5)), jnp.float32)

  def textbook(q, k, v):
    return attend(q, k, v, 0, precision='float32')

  def value_and_gradients(fn):
    y, vjp = jax.vjp(fn, q, k, v)
    return y, *vjp(up)

  for found, expected in zip(
    value_and_gradients(_attend_by_blocks),
    value_and_gradients(textbook),
    strict=True,
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_each_block_has_a_dropout_mask_of_its_own():
  # With values that are the identity, the output is the weights.
  q, v = jnp.zeros((1, 1, 64, 64)), jnp.eye(64)[None, None]
  y = _attend_by_blocks(q, q, v, jax.random.key(0), dropout_rate=0.5)
  kept = np.asarray(y[0, 0]) > 0
  assert 0.4 < kept[np.tril_indices(64)].mean() < 0.6
  first, second = 64 // NUM_BLOCKS, 2 * 64 // NUM_BLOCKS
  assert (kept[first, : first + 1] != kept[second, : first + 1]).any()
