"""Normalizations, against their formulas and against Linen's."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.norms import EPSILON, NORMS, LayerNorm
from tests.shrunk import mostly_slow


def _rms_norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def _layer_norm(x, scale, bias):
  centered = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
  return centered / deviation * scale + bias


FORMULAS = {'LayerNorm': _layer_norm, 'RMSNorm': _rms_norm}


@pytest.mark.parametrize('name', NORMS)
def test_value_and_gradient_of_the_formula(name, rng):
  """The formula is computed in float64, its gradient by differences."""
  formula, norm = FORMULAS[name], NORMS[name](name='norm')
  x, direction = rng.normal(2, 3, (2, 4, 5, 8))
  weights = rng.normal(size=x.shape)
  params = {'scale': rng.normal(size=8), 'bias': rng.normal(size=8)}
  if name == 'RMSNorm':
    del params['bias']

  def total(x):
    y = norm.apply({'params': params}, x)
    return (y * weights).sum(), y

  both = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, actual), gradient = both(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(actual, formula(x, **params), atol=1e-5)
  slope = (gradient * direction).sum()
  ahead, behind = (formula(x + h * direction, **params) for h in (1e-5, -1e-5))
  expected = ((ahead - behind) / 2e-5 * weights).sum()
  assert slope == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize('shape', [(7, 16), (2, 3, 128)])
@pytest.mark.parametrize('offset', mostly_slow([0.0, 5.0], 0.0))
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
    jax.jit(jax.value_and_grad(lambda p, x, m=m: loss(m, p, x), (0, 1)))(
      params, x
    )
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
