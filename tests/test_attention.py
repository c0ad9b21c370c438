"""Attention against a loop over heads and places, and grouped against not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.attention import Attention, _attend_in_parts
from nanomoe.model.norms import NORMS
from nanomoe.model.positions import POSITIONS

D_MODEL, HEADS, TIME = 16, 4, 6


def _attention(num_kv_heads, norm=identity, position='learned'):
  return Attention(
    num_heads=HEADS,
    num_kv_heads=num_kv_heads,
    norm=norm,
    position=POSITIONS[position](TIME),
    use_bias=True,
    dropout_rate=0.0,
    precision='float32',
  )


def _params(module, x, rng):
  init = functools.partial(module.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), x)['params']
  return jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)


def _apply(module, params, x):
  return jax.jit(functools.partial(module.apply, train=False))(
    {'params': params}, x
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
    """Of q, k and v, the heads of k and v as often as they are used."""
    heads = p.reshape(*p.shape[:-1], -1, D_MODEL // HEADS)
    q, k, v = jnp.split(heads, [HEADS, HEADS + num_kv_heads], axis=-2)
    k, v = (jnp.repeat(h, HEADS // num_kv_heads, axis=-2) for h in (k, v))
    return jnp.concatenate([q, k, v], axis=-2).reshape(*p.shape[:-1], -1)

  same = {**params, 'qkv': jax.tree.map(repeated, params['qkv'])}
  y, cache = _apply(grouped, params, x)
  expected, _ = _apply(full, same, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  assert cache.key.shape == (2, num_kv_heads, TIME, D_MODEL // HEADS)


def test_norm_and_rotation_by_a_loop(x, rng):
  """Queries and keys are normalized, then turned; values are neither."""
  module = _attention(2, NORMS['RMSNorm'], 'rope')
  params = _params(module, x, rng)
  y, _ = _apply(module, params, x)
  qkv = np.float64(x @ params['qkv']['kernel'] + params['qkv']['bias'])
  qkv = qkv.reshape(2, TIME, HEADS + 4, 4)
  rows = np.zeros((2, TIME, HEADS, 4))

  def turned(vector, name, t):
    vector = vector / np.sqrt((vector**2).mean() + 1e-6)
    vector = vector * params[name]['scale']
    pairs = vector[:2] + 1j * vector[2:]
    pairs = pairs * np.exp(1j * t * np.array([1.0, 0.01]))
    return np.concatenate([pairs.real, pairs.imag])

  for b, t, h in np.ndindex(2, TIME, HEADS):
    q = turned(qkv[b, t, h], 'q_norm', t)
    shared = HEADS + h // 2
    keys = [turned(qkv[b, s, shared], 'k_norm', s) for s in range(t + 1)]
    weights = np.exp(np.array(keys) @ q / 2)
    values = qkv[b, : t + 1, shared + 2]
    rows[b, t, h] = weights @ values / weights.sum()
  expected = rows.reshape(2, TIME, D_MODEL) @ params['out']['kernel']
  np.testing.assert_allclose(
    y, expected + params['out']['bias'], rtol=1e-3, atol=1e-3
  )


@pytest.mark.parametrize('time', [1, 3, 6, 9])
def test_parts_are_the_whole_in_value_and_gradient(time, rng):
  q, k, v, up = jnp.asarray(rng.normal(size=(4, 2, 3, time, 5)), jnp.float32)

  def whole(q, k, v):
    scores = jnp.einsum('bhtd,bhsd->bhts', q, k) * 5**-0.5
    seen = jnp.tril(jnp.ones((time, time), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum('bhts,bhsd->bhtd', weights, v)

  def parts(q, k, v):
    return _attend_in_parts(
      q, k, v, None, dropout_rate=0.0, precision='float32'
    )

  def both(attend):
    y, back = jax.vjp(attend, q, k, v)
    return y, *back(up)

  for found, wanted in zip(both(parts), both(whole), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_weights_are_dropped_with_masks_of_each_part():
  q, v = jnp.zeros((1, 1, 64, 64)), jnp.eye(64)[None, None]  # y: the weights.
  y = _attend_in_parts(
    q, q, v, jax.random.key(0), dropout_rate=0.5, precision='float32'
  )
  kept = np.asarray(y[0, 0]) > 0
  assert 0.4 < kept[np.tril_indices(64)].mean() < 0.6
  assert (kept[16, :17] != kept[32, :17]).any()  # First rows of two parts.


def test_weights_are_dropped_in_training_alone(x, rng):
  module = _attention(HEADS).clone(dropout_rate=0.5)
  params = {'params': _params(module, x, rng)}
  rngs = {'dropout': jax.random.key(0)}
  (trained, _), (evaluated, _) = (
    module.apply(params, x, train=train, rngs=rngs) for train in (True, False)
  )
  np.testing.assert_array_equal(
    evaluated, _attention(HEADS).apply(params, x, train=False)[0]
  )
  assert np.abs(trained - evaluated).max() > 1e-2
