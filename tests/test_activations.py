"""Activations against JAX's functions and against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np

from nanomoe.ops.activations import ACTIVATIONS, gelu


def test_gelu_is_jax_s_in_value_and_gradient(rng):
  x = jnp.asarray([*rng.normal(size=1000) * 3, 0.0, 20.0, -20.0], jnp.float32)
  expected = lambda x: jax.nn.gelu(x, approximate=True)  # noqa: E731
  np.testing.assert_array_equal(gelu(x), expected(x))
  slope, expected_slope = (
    jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (gelu, expected)
  )
  np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-5)


def test_gelu_keeps_its_input_only():
  _, vjp = jax.vjp(gelu, jnp.ones(7))
  assert [leaf.shape for leaf in jax.tree.leaves(vjp)] == [(7,)]


def test_gelu_hides_no_nan():
  x = jnp.asarray([jnp.nan, 1.0])
  assert jnp.isnan(gelu(x)).tolist() == [True, False]
  assert jnp.isnan(jax.grad(lambda x: gelu(x).sum())(x)).tolist() == [
    True,
    False,
  ]


def test_squared_relu_and_swiglu_are_their_formulas(rng):
  x, gate = jnp.asarray(rng.normal(size=(2, 1000)), jnp.float32)
  relu2 = np.where(x > 0, np.float64(x) ** 2, 0)
  np.testing.assert_allclose(ACTIVATIONS['relu2'].fn(x), relu2, rtol=1e-5)
  expected = np.float64(x) * np.float64(gate) / (1 + np.exp(-np.float64(gate)))
  actual = ACTIVATIONS['swiglu'].fn(x, gate)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
