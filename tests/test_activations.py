"""Activations against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np

from nanomoe.activations import gelu


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
