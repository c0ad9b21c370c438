"""Routing against its definition, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import routers

D_MODEL, NUM_EXPERTS = 6, 4


def _route(x, mask=None, *, top_k=2, balance='documented', params=None):
  router = routers.TopK(NUM_EXPERTS, top_k, balance)
  mask = jnp.ones(len(x), bool) if mask is None else mask
  params = params or router.init(jax.random.key(0), x, mask)
  return router.apply(params, x, mask), params


@pytest.fixture
def x(rng):
  return jnp.asarray(rng.normal(size=(50, D_MODEL)), jnp.float32)


@pytest.mark.parametrize('top_k', [1, 2, 3, 4])
def test_equals_its_definition(x, top_k):
  routing, params = _route(x, top_k=top_k)
  logits = np.float64(x) @ np.float64(params['params']['kernel'])
  order = np.argsort(-logits, axis=1)[:, :top_k]
  np.testing.assert_array_equal(routing.expert, order)
  top = np.exp(np.take_along_axis(logits, order, axis=1))
  np.testing.assert_allclose(
    routing.weight, top / top.sum(1, keepdims=True), rtol=1e-4
  )
  full = np.exp(logits)
  probs = full / full.sum(1, keepdims=True)
  np.testing.assert_allclose(routing.probs, probs, rtol=1e-4, atol=1e-6)
  first = np.bincount(order[:, 0], minlength=NUM_EXPERTS) / len(x)
  np.testing.assert_allclose(
    routing.losses['balance'],
    NUM_EXPERTS * np.sum(first * probs.mean(0)),
    rtol=1e-4,
  )
  np.testing.assert_array_equal(
    routing.load, np.bincount(order.ravel(), minlength=NUM_EXPERTS)
  )


def test_entropy_is_the_mean_of_the_tokens(x):
  mask = jnp.arange(50) < 30
  routing, _ = _route(x, mask)
  entropy, probs = routing.metrics['router_entropy'], routing.probs[:30]
  assert entropy.count == 30
  np.testing.assert_allclose(
    entropy.compute(), -(probs * np.log(probs)).sum(1).mean(), rtol=1e-5
  )


def test_entropy_of_the_uniform_and_of_the_certain():
  mask = jnp.ones(5, bool)
  uniform = routers.entropy(jnp.full((5, 4), 0.25), mask)
  np.testing.assert_allclose(uniform.compute(), np.log(4), rtol=1e-6)
  certain = routers.entropy(jax.nn.one_hot(jnp.arange(5) % 4, 4), mask)
  assert certain.compute() == 0


def test_padding_is_nowhere(x):
  """Routing of 50 tokens, 20 of them padding, is that of the other 30."""
  mask = jnp.arange(50) < 30
  padded, params = _route(x, mask)
  plain, _ = _route(x[:30], params=params)
  assert (padded.expert[30:] == NUM_EXPERTS).all()
  np.testing.assert_array_equal(padded.expert[:30], plain.expert)
  np.testing.assert_array_equal(padded.load, plain.load)
  for name, metric in plain.metrics.items():
    np.testing.assert_allclose(padded.metrics[name], metric, rtol=1e-6)
  np.testing.assert_allclose(
    padded.losses['balance'], plain.losses['balance'], rtol=1e-6
  )


@pytest.mark.parametrize('balance', routers.BALANCE)
def test_balance_is_1_if_uniform(balance):
  expert = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], axis=1)
  probs = jnp.full((8, 4), 0.25)
  loss = routers.BALANCE[balance].layer(expert, probs, jnp.ones(8, bool))
  np.testing.assert_allclose(loss, 1.0)


@pytest.mark.parametrize(('balance', 'worst'), [('documented', 4), ('mean', 2)])
def test_balance_if_collapsed(balance, worst):
  """First choices on one of E experts: E; both on two of them: E / K."""
  expert = jnp.tile(jnp.array([[2, 1]]), (8, 1))
  probs = jax.nn.one_hot(expert, 4).mean(axis=1)
  if balance == 'documented':
    probs = jax.nn.one_hot(expert[:, 0], 4)
  loss = routers.BALANCE[balance].layer(expert, probs, jnp.ones(8, bool))
  np.testing.assert_allclose(loss, worst)


@pytest.mark.parametrize('balance', routers.BALANCE)
def test_gradient_reaches_the_router_and_is_the_hand_derived(x, balance):
  """f is constant, so dL/dz_te = E / N * p_te * (f_e - sum_j f_j p_tj)."""
  _, params = _route(x, balance=balance)

  def loss(params):
    return _route(x, balance=balance, params=params)[0].losses['balance']

  grad = jax.grad(loss)(params)['params']['kernel']
  routing, _ = _route(x, balance=balance, params=params)
  probs = np.float64(routing.probs)
  chosen = routing.expert[:, :1] if balance == 'documented' else routing.expert
  share = np.bincount(np.ravel(chosen), minlength=NUM_EXPERTS) / chosen.size
  dz = probs * (share - (probs @ share)[:, None]) * NUM_EXPERTS / len(x)
  np.testing.assert_allclose(grad, np.float64(x).T @ dz, rtol=1e-3, atol=1e-6)
  assert np.abs(grad).max() > 1e-4
