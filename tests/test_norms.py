"""Norms against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.norms import EPSILON, NORMS


def _rms_norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale


def _layer_norm(x, scale, bias):
  centered = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
  return centered / deviation * scale + bias


FORMULAS = {'LayerNorm': _layer_norm, 'RMSNorm': _rms_norm}


@pytest.mark.parametrize('name', NORMS)
def test_value_and_gradient_are_the_formula_s(name, rng):
  """In float64; the gradient along a direction, by differences."""
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
