"""The short convolution, against a loop over time, and with its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.convolution import ShortConvolution, convolve


def _loop(x, kernel):
  y = np.zeros_like(x)
  for t in range(x.shape[1]):
    for j in range(min(len(kernel), t + 1)):
      y[:, t] += kernel[j] * x[:, t - j]
  return y


@pytest.mark.parametrize('width', [1, 2, 4])
def test_a_loop_over_time_and_its_gradient(rng, width):
  x = rng.normal(size=(2, 6, 3)).astype(np.float32)
  kernel = rng.normal(size=(width, 3)).astype(np.float32)
  y = convolve(jnp.asarray(x), jnp.asarray(kernel))
  np.testing.assert_allclose(y, _loop(x, kernel), rtol=1e-5)
  of_y = rng.normal(size=x.shape).astype(np.float32)
  _, gradient = jax.vjp(convolve, jnp.asarray(x), jnp.asarray(kernel))
  of_x, of_kernel = gradient(jnp.asarray(of_y))
  # The convolution is linear in each argument: the gradient is <g, f(e)> for
  # each unit vector e.
  for array, found, f in (
    (x, of_x, lambda e: _loop(e, kernel)),
    (kernel, of_kernel, lambda e: _loop(x, e)),
  ):
    for index in np.ndindex(*array.shape):
      unit = np.zeros_like(array)
      unit[index] = 1
      assert np.vdot(of_y, f(unit)) == pytest.approx(
        float(found[index]), abs=1e-5
      )


@pytest.mark.parametrize('width', [1, 3])
def test_it_continues_from_any_position(rng, width):
  """Two sequences continue from different positions, followed by padding."""
  x = jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)
  module = ShortConvolution(width)
  params = {'params': {'filter': jnp.asarray(rng.normal(size=(width, 4)))}}
  whole, _ = module.apply(params, x, None, jnp.zeros(2, jnp.int32))
  start = jnp.array([1, 5])
  cache = jnp.where(jnp.arange(8)[:, None] < start[:, None, None], x, 99.0)
  next_two = jnp.stack([x[0, 1:3], x[1, 5:7]])
  y, _ = module.apply(params, next_two, cache, start)
  expected = jnp.stack([whole[0, 1:3], whole[1, 5:7]])
  np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_it_starts_as_the_identity(rng):
  x = jnp.asarray(rng.normal(size=(1, 5, 4)), jnp.float32)
  start = jnp.zeros(1, jnp.int32)
  y, _ = ShortConvolution(3).init_with_output(jax.random.key(0), x, None, start)
  np.testing.assert_array_equal(y[0], x)
