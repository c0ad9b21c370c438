"""Matrix products against float64, with all subscripts that the model uses."""

import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.ops import matmul
from tests.shrunk import mostly_slow

SUBSCRIPTS = {
  'nd,df->nf': ({'n': 33, 'd': 8, 'f': 12}),
  'gnd,gdf->gnf': ({'g': 3, 'n': 16, 'd': 8, 'f': 12}),
  'gnf,gfd->gnd': ({'g': 3, 'n': 16, 'd': 8, 'f': 12}),
  'bhtd,bhsd->bhts': ({'b': 2, 'h': 3, 't': 5, 's': 7, 'd': 4}),
  'bhts,bhsd->bhtd': ({'b': 2, 'h': 3, 't': 5, 's': 7, 'd': 4}),
}


def _operands(subscripts, sizes, rng):
  """Returns integers that bfloat16 holds exactly; only sums can be inexact."""
  x, w = subscripts.split('->')[0].split(',')

  def draw(index):
    values = rng.integers(-8, 9, [sizes[i] for i in index])
    return jnp.asarray(values, jnp.float32)

  return draw(x), draw(w)


@pytest.mark.parametrize('precision', matmul.PRECISIONS)
@pytest.mark.parametrize('subscripts', SUBSCRIPTS)
def test_value_and_gradients_equal_float64(subscripts, precision, rng):
  x, w = _operands(subscripts, SUBSCRIPTS[subscripts], rng)
  expected = np.einsum(subscripts, np.float64(x), np.float64(w))
  g = jnp.asarray(rng.integers(-8, 9, expected.shape), jnp.float32)

  y, vjp = jax.vjp(
    lambda x, w: matmul.einsum(subscripts, x, w, precision), x, w
  )
  dx, dw = vjp(g)

  operands, out = subscripts.split('->')
  x_index, w_index = operands.split(',')
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(
    dx, np.einsum(f'{out},{w_index}->{x_index}', g, np.float64(w))
  )
  np.testing.assert_array_equal(
    dw, np.einsum(f'{x_index},{out}->{w_index}', np.float64(x), g)
  )
  assert y.dtype == dx.dtype == dw.dtype == jnp.float32


@pytest.mark.parametrize('size', [1, 2, 31, 64])
def test_every_size_compiles_in_bfloat16(size, rng):
  """XLA's CPU products refuse some layouts, but not the requested ones."""
  x = jnp.asarray(rng.normal(size=(2, size, size)), jnp.float32)

  @jax.jit
  def loss(x, w):
    return jnp.sum(matmul.einsum('gnd,gdf->gnf', x, w, 'bfloat16') ** 2)

  dx, dw = jax.grad(loss, argnums=(0, 1))(x, x)
  y = np.einsum('gnd,gdf->gnf', x, x)
  expected = 2 * np.einsum('gnd,gnf->gdf', x, y)
  np.testing.assert_allclose(dw, expected, atol=0.02 * np.abs(expected).max())
  assert np.isfinite(dx).all()


def test_bfloat16_rounds_operands_and_float32_does_not():
  x = jnp.float32([[1 + 2**-12]])
  one = jnp.ones((1, 1))
  assert matmul.einsum('nd,df->nf', x, one, 'float32')[0, 0] == x[0, 0]
  assert matmul.einsum('nd,df->nf', x, one, 'bfloat16')[0, 0] == 1


def test_auto_follows_the_machine(monkeypatch):
  for flags, expected in [
    ({'avx2'}, 'float32'),
    ({'avx2', 'amx_bf16'}, 'bfloat16'),
    (set(), 'float32'),
  ]:
    monkeypatch.setattr(matmul, '_cpu_flags', lambda f=flags: f)
    assert matmul.resolve_precision('auto') == expected
    assert matmul.resolve_precision('float32') == 'float32'


@pytest.mark.parametrize('precision', matmul.PRECISIONS)
def test_bias_and_its_gradient(precision, rng):
  x, w = _operands('gnd,gdf->gnf', {'g': 3, 'n': 16, 'd': 8, 'f': 12}, rng)
  bias = jnp.asarray(rng.integers(-8, 9, (3, 12)), jnp.float32)
  g = jnp.asarray(rng.integers(-8, 9, (3, 16, 12)), jnp.float32)
  y, vjp = jax.vjp(
    lambda bias: matmul.einsum('gnd,gdf->gnf', x, w, precision, bias), bias
  )
  expected = np.einsum('gnd,gdf->gnf', x, w) + bias[:, None]
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(vjp(g)[0], g.sum(axis=1))


@pytest.mark.parametrize('precision', matmul.PRECISIONS)
@pytest.mark.parametrize(
  'sizes', mostly_slow([[16], [5, 0, 10, 1], [0, 0, 16]], [5, 0, 10, 1])
)
def test_ragged_product_is_the_product_of_each_group(sizes, precision, rng):
  """Values and gradients are exact, for rows, weights and biases."""

  def draw(*shape):
    return jnp.asarray(rng.integers(-8, 9, shape), jnp.float32)

  groups = len(sizes)
  operands = draw(16, 8), draw(groups, 8, 12), draw(groups, 12)
  g = draw(16, 12)

  def by_group(x, w, bias):
    ends = np.cumsum(sizes)
    parts = [
      x[end - size : end] @ w[i] + bias[i]
      for i, (end, size) in enumerate(zip(ends, sizes, strict=True))
    ]
    return jnp.concatenate(parts)

  @jax.jit
  def ragged(x, w, bias):
    return matmul.ragged_dot(x, w, bias, jnp.asarray(sizes), precision)

  y, vjp = jax.vjp(ragged, *operands)
  expected, expected_vjp = jax.vjp(by_group, *operands)
  np.testing.assert_array_equal(y, expected)
  for actual, gradient in zip(vjp(g), expected_vjp(g), strict=True):
    np.testing.assert_array_equal(actual, gradient)
    assert actual.dtype == jnp.float32


@pytest.mark.skipif(
  (platform.system(), platform.machine()) != ('Linux', 'x86_64'),
  reason='other names of flags',
)
def test_the_features_of_this_cpu_are_read():
  assert {'fpu', 'sse2'} <= matmul._cpu_flags()


def test_auto_is_bfloat16_on_gpus(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(matmul, '_cpu_flags', set)
  assert matmul.resolve_precision('auto') == 'bfloat16'
