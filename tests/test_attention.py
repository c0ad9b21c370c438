"""Causal self-attention: its formula, grouped queries, cache and dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.attention import XAVIER, CausalSelfAttention, attend
from nanomoe.model.interfaces import AttentionInputs
from nanomoe.model.norms import NORMS, no_norm
from nanomoe.model.positions import POSITIONS

D_MODEL, HEADS, TIME = 16, 4, 6


def _attention(num_kv_heads, norm=no_norm, position='learned'):
  return CausalSelfAttention(
    num_heads=HEADS,
    num_kv_heads=num_kv_heads,
    norm=norm,
    position=POSITIONS[position](TIME),
    use_bias=True,
    dropout_rate=0.0,
    precision='float32',
    out_init=XAVIER,
  )


def _params(module, x, rng):
  init = functools.partial(module.init, train=False)
  key, inputs = jax.random.key(0), AttentionInputs()
  params = jax.eval_shape(init, key, x, inputs)['params']
  return jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)


def _apply(module, params, x, inputs=None):
  return jax.jit(functools.partial(module.apply, train=False))(
    {'params': params}, x, inputs or AttentionInputs()
  )


@pytest.fixture
def x(rng):
  return jnp.asarray(rng.normal(size=(2, TIME, D_MODEL)), jnp.float32)


@pytest.mark.parametrize('num_kv_heads', [1, 2])
def test_grouped_queries_are_heads_with_equal_keys_and_values(
  num_kv_heads, x, rng
):
  grouped, full = _attention(num_kv_heads), _attention(HEADS)
  params = _params(grouped, x, rng)

  def repeated(p):
    """Returns the projection with a head of k and v for each head of q."""
    size = HEADS // num_kv_heads
    shape = *p.shape[:-1], num_kv_heads, size + 2, D_MODEL // HEADS
    groups = p.reshape(shape)
    q, *kv = jnp.split(groups, [size, size + 1], axis=-2)
    k, v = (jnp.repeat(h, size, axis=-2) for h in kv)
    return jnp.stack([q, k, v], axis=-2).reshape(*p.shape[:-1], -1)

  same = {**params, 'qkv': jax.tree.map(repeated, params['qkv'])}
  y, cache = _apply(grouped, params, x)
  expected, _ = _apply(full, same, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  assert cache.key.shape == (2, num_kv_heads, TIME, D_MODEL // HEADS)


def test_norm_and_rotation_by_a_loop(x, rng):
  """Queries and keys are normalized, then rotated; values are neither."""
  module = _attention(2, NORMS['RMSNorm'], 'rope')
  params = _params(module, x, rng)
  y, _ = _apply(module, params, x)
  qkv = np.float64(x @ params['qkv']['kernel'] + params['qkv']['bias'])
  qkv = qkv.reshape(2, TIME, 2, HEADS // 2 + 2, 4)
  rows = np.zeros((2, TIME, HEADS, 4))

  def rotated(vector, name, t):
    vector = vector / np.sqrt((vector**2).mean() + 1e-6)
    vector = vector * params[name]['scale']
    pairs = vector[:2] + 1j * vector[2:]
    pairs = pairs * np.exp(1j * t * np.array([1.0, 0.01]))
    return np.concatenate([pairs.real, pairs.imag])

  for b, t, h in np.ndindex(2, TIME, HEADS):
    group = qkv[b, :, h // 2]
    q = rotated(group[t, h % 2], 'q_norm', t)
    keys = [rotated(group[s, 2], 'k_norm', s) for s in range(t + 1)]
    weights = np.exp(np.array(keys) @ q / 2)
    values = group[: t + 1, 3]
    rows[b, t, h] = weights @ values / weights.sum()
  expected = rows.reshape(2, TIME, D_MODEL) @ params['out']['kernel']
  np.testing.assert_allclose(
    y, expected + params['out']['bias'], rtol=1e-3, atol=1e-3
  )


def test_the_textbook_formula(rng):
  """Rows from position 3 on, in float64; one sequence starts later."""
  q = rng.normal(size=(2, 3, 2, 5))
  k, v = rng.normal(size=(2, 2, 3, TIME, 5))
  starts = [1, 3]
  y = attend(
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
    jnp.array(starts)[:, None],
    precision='float32',
  )
  for b, h, i in np.ndindex(2, 3, 2):
    visible = slice(starts[b] + i + 1)
    weights = np.exp(k[b, h, visible] @ q[b, h, i] / 5**0.5)
    expected = weights @ v[b, h, visible] / weights.sum()
    np.testing.assert_allclose(y[b, h, i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('step', [1, 2])
def test_a_window_in_steps_is_the_window_at_once(step, x, rng):
  """From a prompt of another length in each sequence on."""
  module = _attention(2, NORMS['RMSNorm'], 'rope')
  params = _params(module, x, rng)
  expected, _ = _apply(module, params, x)
  start = jnp.array([1, 2])
  _, cache = _apply(module, params, x, AttentionInputs(length=start))
  for _ in range(2):
    rows = start[:, None] + jnp.arange(step)
    x_next = jnp.take_along_axis(x, rows[..., None], axis=1)
    inputs = AttentionInputs(cache, start)
    y, cache = _apply(module, params, x_next, inputs)
    np.testing.assert_allclose(
      y,
      jnp.take_along_axis(expected, rows[..., None], axis=1),
      rtol=1e-4,
      atol=1e-4,
    )
    start += step


def test_weights_are_dropped_in_training_alone(x, rng):
  module = _attention(HEADS).clone(dropout_rate=0.5)
  params = {'params': _params(module, x, rng)}
  rngs = {'dropout': jax.random.key(0)}
  inputs = AttentionInputs()
  (trained, _), (evaluated, _) = (
    module.apply(params, x, inputs, train=train, rngs=rngs)
    for train in (True, False)
  )
  np.testing.assert_array_equal(
    evaluated, _attention(HEADS).apply(params, x, inputs, train=False)[0]
  )
  assert np.abs(trained - evaluated).max() > 1e-2
