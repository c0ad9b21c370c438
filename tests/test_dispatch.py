"""Sparse dispatch equals the dense oracle, in value and in gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import products
from nanomoe import dispatch
from nanomoe.routers import Routing

SPARSE = [name for name in dispatch.DISPATCH if name != 'dense']
NUM_EXPERTS, D_MODEL, D_FF = 5, 8, 12


def _experts(rng, num_experts=NUM_EXPERTS, d_model=D_MODEL, d_ff=D_FF):
  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return dispatch.Experts(
    draw(num_experts, d_model, d_ff),
    draw(num_experts, d_ff),
    draw(num_experts, d_ff, d_model),
    draw(num_experts, d_model),
  )


def _routing(expert, rng, num_experts=NUM_EXPERTS):
  expert = jnp.asarray(expert, jnp.int32)
  weight = jnp.asarray(rng.uniform(0.1, 1, expert.shape), jnp.float32)
  probs = jnp.full((len(expert), num_experts), 1 / num_experts)
  load = jnp.zeros(num_experts, jnp.int32)
  return Routing(expert, weight, probs, load, {}, {})


def _choices(kind: str, top_k: int, rng) -> np.ndarray:
  """int[N, K], each row without repetition; E is padding."""
  n = 203
  ranks = rng.random((n, NUM_EXPERTS)).argsort(axis=1)[:, :top_k]
  if kind == 'one expert':  # Everybody's first choice; the rest in order.
    return np.tile(np.arange(top_k), (n, 1))
  if kind == 'one row':  # An expert with one token, and one with none.
    ranks = np.tile((np.arange(top_k) + 2) % NUM_EXPERTS, (n, 1))
    ranks[100, 0] = 1
  if kind == 'padding':
    ranks[50:120] = NUM_EXPERTS
  if kind == 'all padding':
    ranks[:] = NUM_EXPERTS
  return ranks


@pytest.mark.parametrize('top_k', range(1, NUM_EXPERTS + 1))
@pytest.mark.parametrize(
  'kind', ['random', 'one expert', 'one row', 'padding', 'all padding']
)
@pytest.mark.parametrize('name', SPARSE)
def test_equals_dense(name, kind, top_k, rng):
  routing = _routing(_choices(kind, top_k, rng), rng)
  experts = _experts(rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

  def value_and_gradients(combine):
    @jax.jit  # Compiled as a whole: faster than op by op, and what runs.
    def run(x, weight, experts):
      def loss(x, weight, experts):
        y = combine(x, routing._replace(weight=weight), experts, 'float32')
        return jnp.sum(y * direction), y

      grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
      return grad(x, weight, experts)

    return run(x, routing.weight, experts)

  (_, expected), expected_grads = value_and_gradients(dispatch.dense)
  (_, actual), grads = value_and_gradients(dispatch.DISPATCH[name])
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3),
    grads,
    expected_grads,
  )
  if kind != 'all padding':
    assert float(jnp.abs(expected).max()) > 0.1


def test_dense_equals_a_loop_over_tokens(rng):
  """The oracle itself, against the definition in float64."""
  routing = _routing(_choices('padding', 2, rng), rng)
  experts = _experts(rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  y = dispatch.dense(x, routing, experts, 'float32')
  w_in, b_in, w_out, b_out = (np.float64(w) for w in experts)

  def gelu(z):
    inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    return 0.5 * z * (1 + np.tanh(inner))

  for t in range(len(x)):
    expected = np.zeros(D_MODEL)
    for e, weight in zip(routing.expert[t], routing.weight[t], strict=True):
      if e < NUM_EXPERTS:
        hidden = gelu(np.float64(x[t]) @ w_in[e] + b_in[e])
        expected += float(weight) * (hidden @ w_out[e] + b_out[e])
    np.testing.assert_allclose(y[t], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', SPARSE)
def test_bfloat16_is_close(name, rng):
  routing = _routing(_choices('random', 2, rng), rng)
  experts = _experts(rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  exact = dispatch.dense(x, routing, experts, 'float32')
  rounded = dispatch.DISPATCH[name](x, routing, experts, 'bfloat16')
  error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
  assert 0 < error < 0.02


@pytest.mark.parametrize('num_experts', [4, 8, 64])
@pytest.mark.parametrize('name', SPARSE)
def test_computes_the_chosen_experts_only(name, num_experts, rng):
  """Products are those of K experts per token and, at most, 15 % of padding.

  The gradient computes the hidden layer again: 7 products where 6 are needed.
  """
  n, top_k, d_model, d_ff = 4096, 2, 16, 32
  expert = rng.random((n, num_experts)).argsort(axis=1)[:, :top_k]
  routing = _routing(expert, rng, num_experts)
  experts = _experts(rng, num_experts, d_model, d_ff)
  x = jnp.ones((n, d_model))

  def loss(x, weight, experts):
    routed = routing._replace(weight=weight)
    return dispatch.DISPATCH[name](x, routed, experts, 'float32').sum()

  product = 2 * n * top_k * d_model * d_ff
  forward = products.count(loss, x, routing.weight, experts)
  assert 2 * product <= forward < 1.15 * 2 * product
  grad = jax.grad(loss, argnums=(0, 1, 2))
  counted = products.count(grad, x, routing.weight, experts)
  assert 6 * product <= counted < 1.15 * 7 * product


@pytest.mark.parametrize('num_tokens', [1, 2, 7, 64, 1000])
def test_plan_gives_each_assignment_a_slot_of_its_expert(num_tokens, rng):
  expert = rng.integers(0, NUM_EXPERTS + 1, (num_tokens, 3))
  plan = dispatch.make_plan(jnp.asarray(expert, jnp.int32), NUM_EXPERTS, D_FF)
  size = len(plan.token_of_slot) // len(plan.expert_of_block)
  taken = [
    (int(plan.slot[t, k]), t, k)
    for t in range(num_tokens)
    for k in range(3)
    if expert[t, k] < NUM_EXPERTS
  ]
  assert len({slot for slot, _, _ in taken}) == len(taken)
  for slot, t, k in taken:
    assert plan.token_of_slot[slot] == t
    assert plan.assignment_of_slot[slot] == 3 * t + k
    assert plan.expert_of_block[slot // size] == expert[t, k]
  assert (plan.token_of_slot < num_tokens).sum() == len(taken)
