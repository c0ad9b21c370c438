"""The norms' values and gradients, against Linen's."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.norms import EPSILON, LayerNorm


@pytest.mark.parametrize('shape', [(7, 16), (2, 3, 128)])
@pytest.mark.parametrize('offset', [0.0, 5.0])
def test_layer_norm_is_linens(shape, offset):
  keys = jax.random.split(jax.random.key(0), 4)
  x = offset + jax.random.normal(keys[0], shape)
  upstream = jax.random.normal(keys[1], shape)
  params = {
    'scale': jax.random.normal(keys[2], shape[-1:]),
    'bias': jax.random.normal(keys[3], shape[-1:]),
  }

  def loss(module, params, x):
    return jnp.vdot(upstream, module.apply({'params': params}, x))

  linens = nn.LayerNorm(epsilon=EPSILON)
  ours, theirs = (
    jax.value_and_grad(lambda p, x, m=m: loss(m, p, x), (0, 1))(params, x)
    for m in (LayerNorm(), linens)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
    ours,
    theirs,
  )
  assert jax.tree.structure(LayerNorm().init(keys[0], x)) == (
    jax.tree.structure(linens.init(keys[0], x))
  )
