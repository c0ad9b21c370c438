"""Position encodings: invariance, formula, and learned embeddings."""

import jax.numpy as jnp
import numpy as np

from nanomoe.model.positions import POSITIONS, THETA

rope = POSITIONS['rope'](99)


def _rotated(x, position):
  return rope.rotate(jnp.asarray(x, jnp.float32), jnp.atleast_2d(position))


def test_scores_depend_on_the_distance_alone(rng):
  """The score of q with k three positions before is the same everywhere."""
  q, k = rng.normal(size=(2, 1, 2, 1, 8))

  def score(i, j):
    product = _rotated(q, jnp.array([i])) * _rotated(k, jnp.array([j]))
    return product.sum(-1).ravel()

  for i in (7, 50):
    np.testing.assert_allclose(score(i, i - 3), score(3, 0), atol=1e-4)
    assert np.abs(score(i, i - 4) - score(3, 0)).min() > 1e-3


def test_pairs_turn_by_the_formula(rng):
  """Complex numbers x_i + j x_(i + 4) are times e^(j position theta_i)."""
  x = rng.normal(size=(2, 3, 5, 8))
  position = np.array([[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]])
  angle = position[:, None, :, None] * THETA ** (-np.arange(4) / 4)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
  expected = np.concatenate([turned.real, turned.imag], axis=-1)
  np.testing.assert_allclose(_rotated(x, position), expected, atol=1e-5)


def test_learned_positions_are_added(rng):
  table, x = rng.normal(size=(6, 4)), rng.normal(size=(2, 3, 4))
  learned = POSITIONS['learned'](6)

  def param(name, init, shape):
    assert shape == table.shape
    return jnp.asarray(table)

  y = learned.embed(param, x, None)
  np.testing.assert_allclose(y - x, np.stack([table[:3]] * 2), atol=1e-6)
  y = learned.embed(param, x, jnp.array([1, 3]))
  np.testing.assert_allclose(
    y - x, np.stack([table[1:4], table[3:6]]), atol=1e-6
  )
