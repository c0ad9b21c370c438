"""Compares values and gradients of routers' losses with float64 by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.moe import RouterInputs, losses
from tests.routed import NUM_EXPERTS, QUICKLY, TOP_K, make

E, K = NUM_EXPERTS, TOP_K
BATCH, TIME, D_MODEL = 3, 8, 5
LOSSES = [*losses.BALANCE, 'z_loss', 'router_entropy']


@pytest.mark.parametrize('name', losses.BALANCE)
def test_balance_is_1_if_uniform(name):
  expert = jnp.stack([jnp.arange(8) % 4, (jnp.arange(8) + 1) % 4], axis=1)
  probs = jnp.full((8, 4), 0.25)
  sums = losses.BALANCE[name].layer(expert, probs, jnp.ones((2, 4), bool))
  loss = losses.value(sums)
  np.testing.assert_allclose(loss, 1.0)


@pytest.mark.parametrize(
  ('name', 'worst'),
  [('switch_sum', 4), ('all_choices', 2), ('per_sequence', 2)],
)
def test_balance_if_collapsed(name, worst):
  """The loss is E for first choices on one expert, E / K for K on K experts."""
  expert = jnp.tile(jnp.array([[2, 1]]), (8, 1))
  probs = jax.nn.one_hot(expert, 4).mean(axis=1)
  if name == 'switch_sum':
    probs = jax.nn.one_hot(expert[:, 0], 4)
  sums = losses.BALANCE[name].layer(expert, probs, jnp.ones((2, 4), bool))
  loss = losses.value(sums)
  np.testing.assert_allclose(loss, worst)


def test_sequences_that_are_even_together_alone():
  """Each sequence collapses on its own expert; the batch is balanced."""
  expert = jnp.array([[0]] * 4 + [[1]] * 4)
  probs = jax.nn.one_hot(expert[:, 0], 2)
  mask = jnp.ones((2, 4), bool)
  assert losses.value(losses.balance_of_all_choices(expert, probs, mask)) == 1
  assert losses.value(losses.balance_of_sequences(expert, probs, mask)) == 2
  # By expert, in any order, and of other lengths.
  token = jnp.array([5, 0, 7, 1, 6, 2, 4, 3])
  by_expert = expert[token], probs, mask.at[1, 2:].set(False), token
  assert losses.value(losses.balance_of_sequences(*by_expert)) == 2


@pytest.mark.parametrize('name', losses.BALANCE)
def test_parts_add_up_to_the_loss(name, rng):
  """Parts of one, two and no counted sequences, with the load of all."""
  expert = jnp.asarray(rng.integers(0, E, (4 * TIME, K)))
  probs = jax.nn.softmax(jnp.asarray(rng.normal(size=(4 * TIME, E))))
  mask = jnp.asarray(rng.random((4, TIME)) < 0.7).at[3].set(False)
  expert = jnp.where(mask.reshape(-1, 1), expert, E)
  layer = losses.BALANCE[name].layer
  whole = layer(expert, probs, mask)
  load = whole.load if isinstance(whole, losses.Shares) else None
  parts = [
    layer(expert[i * TIME : j * TIME], probs[i * TIME : j * TIME], mask[i:j])
    for i, j in ((0, 1), (1, 3), (3, 4))
  ]
  values = [losses.value(part, whole.count, load) for part in parts]
  np.testing.assert_allclose(sum(values), losses.value(whole), rtol=1e-6)
  assert values[2] == 0
  own = [losses.value(part, whole.count) for part in parts]
  is_exact = abs(sum(own) - losses.value(whole)) < 1e-6
  assert is_exact == losses.BALANCE[name].of_sequences


def test_how_layers_are_joined():
  layers = jnp.array([1.0, 2.0])
  joined = {name: b.join(layers) for name, b in losses.BALANCE.items()}
  assert joined == {'switch_sum': 3.0, 'all_choices': 1.5, 'per_sequence': 1.5}


def test_entropy_of_the_uniform_and_of_the_certain():
  mask = jnp.ones(5, bool)
  uniform = losses.entropy(jnp.full((5, 4), 0.25), mask)
  np.testing.assert_allclose(uniform.compute(), np.log(4), rtol=1e-6)
  certain = jax.nn.one_hot(jnp.arange(5) % 4, 4)
  assert losses.entropy(certain, mask).compute() == 0
  gradient = jax.grad(lambda p: losses.entropy(p, mask).total)(certain)
  assert np.isfinite(gradient).all()


@pytest.fixture
def case(rng):
  """Returns x, a mask with a sequence of padding, and the router's kernel."""
  mask = rng.random((BATCH, TIME)) < 0.8
  mask[2] = False
  kernel = rng.normal(size=(D_MODEL, E))
  return rng.normal(size=(BATCH, TIME, D_MODEL)), mask, kernel


@pytest.mark.parametrize(
  'variant', ['TopK', 'Switch', 'Mixtral', 'NoisyTopK', 'Sigmoid']
)
@pytest.mark.parametrize('loss', LOSSES)
def test_value_and_gradient_are_those_by_hand(loss, variant, case):
  """The gradient is that of the kernel; the selection is constant."""
  x, mask, kernel = case
  name = loss if loss in losses.BALANCE else 'all_choices'
  router = make(variant, name)
  key = 'balance' if loss in losses.BALANCE else loss

  def of(kernel, x, mask):
    params = {'params': {'kernel': kernel, 'noise': jnp.zeros_like(kernel)}}
    tokens = jnp.zeros(mask.shape, jnp.int32)
    inputs = RouterInputs(tokens, mask)
    routing = router.apply(params, x, inputs, train=False)
    return losses.value(routing.losses[key]), routing.expert

  with jax.enable_x64(True):
    run = QUICKLY(jax.value_and_grad(of, has_aux=True))
    (value, expert), gradient = run(kernel, x, mask)
  assert gradient.dtype == np.float64

  flat = mask.reshape(-1)
  n = flat.sum()
  z = x.reshape(-1, D_MODEL) @ kernel
  of_sigmoids = variant == 'Sigmoid'
  scores = 1 / (1 + np.exp(-z)) if of_sigmoids else np.exp(z)
  total = scores.sum(axis=1, keepdims=True)
  p = scores / total
  # dL/dp, for a loss of p, becomes dL/dz: p_j = s(z_j) / sum_i s(z_i).
  slope = scores * (1 - scores) if of_sigmoids else scores

  def through(dp):
    return slope / total * (dp - np.sum(dp * p, axis=1, keepdims=True))

  def share(rows):
    load = np.bincount(np.ravel(rows), minlength=E + 1)[:E]
    return load / max(load.sum(), 1)

  chosen = np.where(flat[:, None], expert, E)
  entropy = -np.sum(p * np.log(p), axis=1)
  squares = np.log(np.exp(z).sum(axis=1))
  # E sum_e f_e P_e has dp = E f_e / n.
  f = share(chosen[:, :1] if loss == 'switch_sum' else chosen)
  f = np.tile(f, (len(z), 1)) * E / n
  if loss == 'per_sequence':  # Two sequences count.
    own = [share(rows) for rows in chosen.reshape(BATCH, TIME, K)]
    f = (
      np.repeat(own, TIME, axis=0)
      * E
      / mask.sum(axis=1).repeat(TIME).clip(1).reshape(-1, 1)
    )
    f /= 2
  expected, dz = {
    'z_loss': (
      squares**2 / n,
      2 / n * squares[:, None] * np.exp(z - squares[:, None]),
    ),
    'router_entropy': (entropy / n, through(-(np.log(p) + 1) / n)),
  }.get(loss, (np.sum(f * p, axis=1), through(f)))
  np.testing.assert_allclose(value, np.sum(expected * flat), rtol=1e-10)
  by_hand = x.reshape(-1, D_MODEL).T @ (dz * flat[:, None])
  np.testing.assert_allclose(gradient, by_hand, rtol=1e-9, atol=1e-12)
  assert np.abs(by_hand).max() > 1e-3


def test_z_loss_where_experts_choose(case):
  x, mask, kernel = case

  def of(kernel, x, mask):
    tokens = jnp.zeros(mask.shape, jnp.int32)
    router = make('ExpertChoice', 'all_choices')
    params = {'params': {'kernel': kernel}}
    inputs = RouterInputs(tokens, mask)
    routing = router.apply(params, x, inputs, train=False)
    return losses.value(routing.losses['z_loss'])

  z = x[mask] @ kernel
  wanted = np.mean(np.log(np.exp(z).sum(axis=1)) ** 2)
  assert float(QUICKLY(of)(kernel, x, mask)) == pytest.approx(wanted, rel=1e-5)
