"""Compares routers with their definitions in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.moe import RouterInputs, experts, losses
from nanomoe.moe.dispatch.dense import dense
from nanomoe.moe.layer import dispatch_rows
from tests.routed import NUM_EXPERTS, QUICKLY, TOP_K, VARIANTS, VOCAB, make
from tests.routed import layer as make_moe
from tests.shrunk import mostly_slow

BATCH, TIME, D_MODEL = 2, 15, 5


@pytest.fixture
def x(rng):
  return jnp.asarray(rng.normal(size=(BATCH, TIME, D_MODEL)), jnp.float32)


@pytest.fixture
def tokens(rng):
  return jnp.asarray(rng.integers(0, VOCAB, (BATCH, TIME)), jnp.int32)


@pytest.fixture
def params(rng):
  def draw():
    return jnp.asarray(rng.normal(size=(D_MODEL, NUM_EXPERTS)), jnp.float32)

  return {'params': {'kernel': draw(), 'noise': draw()}}


def route(router, params, x, tokens, mask=None, bias=None, key=None):
  """Returns the routing; `train` is True if there is a key."""
  mask = jnp.ones(tokens.shape, bool) if mask is None else mask
  rngs = {} if key is None else {'routing': key}

  @QUICKLY
  def run(params, x, tokens, mask, bias, rngs):
    inputs = RouterInputs(tokens, mask, bias)
    return router.apply(params, x, inputs, train=key is not None, rngs=rngs)

  return run(params, x, tokens, mask, bias, rngs)


def gates(routing, num_tokens=BATCH * TIME):
  """Returns each token's weight of each expert, [N, E]; 0 if not chosen."""
  routing = jax.device_get(routing)
  gate = np.zeros((num_tokens, NUM_EXPERTS + 1))
  rows = np.arange(len(routing.expert))
  token = rows if routing.token is None else routing.token
  for row in rows:
    for e, w in zip(routing.expert[row], routing.weight[row], strict=True):
      assert gate[token[row], e] == 0 or e == NUM_EXPERTS
      gate[token[row], e] = w
  return gate[:, :NUM_EXPERTS]


def softmax(z):
  return np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)


def highest(scores, k):
  """Marks the k highest scores of each row."""
  rank = np.argsort(np.argsort(-scores, axis=-1), axis=-1)
  return rank < k


def normalized(gate):
  return gate / gate.sum(axis=-1, keepdims=True)


def topk(z, bias):
  return normalized(np.where(highest(z, TOP_K), np.exp(z), 0)), softmax(z)


def switch(z, bias):
  return softmax(z) * highest(z, TOP_K), softmax(z)


def sigmoid(z, bias, num_groups=1, groups_kept=1):
  scores = 1 / (1 + np.exp(-z))
  groups = (scores + bias).reshape(len(z), num_groups, -1)
  value = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
  kept = highest(value, groups_kept)[..., None]
  selection = np.where(kept, groups, -np.inf).reshape(z.shape)
  gate = np.where(highest(selection, TOP_K), scores, 0)
  return normalized(gate), normalized(scores)


def expert_choice(z, bias):
  probs = softmax(z)
  capacity = -(-len(z) * TOP_K // NUM_EXPERTS)
  return probs * highest(probs.T, capacity).T, probs


DEFINITIONS = {
  'TopK': topk,
  'Switch': switch,
  'Mixtral': topk,
  'Sigmoid': sigmoid,
  'grouped': lambda z, bias: sigmoid(z, bias, num_groups=3, groups_kept=2),
  'NoisyTopK': topk,
  'ExpertChoice': expert_choice,
}


@pytest.mark.parametrize('variant', DEFINITIONS)
def test_equals_its_definition(variant, x, tokens, params, rng):
  """Gates, probabilities and loads agree, in evaluation with padding."""
  bias = rng.normal(size=NUM_EXPERTS)
  mask = rng.random((BATCH, TIME)) < 0.7
  routing = route(
    make(variant), params, x, tokens, mask, jnp.asarray(bias, jnp.float32)
  )
  kernel = np.float64(params['params']['kernel'])
  gate, probs = DEFINITIONS[variant](np.float64(x)[mask] @ kernel, bias)
  mask = mask.reshape(-1)
  actual = gates(routing)
  np.testing.assert_allclose(actual[mask], gate, rtol=1e-4, atol=1e-6)
  assert (actual[~mask] == 0).all()
  np.testing.assert_allclose(routing.probs[mask], probs, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(routing.load, (gate > 0).sum(axis=0))
  if DEFINITIONS[variant] in (topk, switch):  # First choice first.
    assert (np.diff(routing.weight, axis=1) <= 0).all()


@pytest.mark.parametrize('variant', DEFINITIONS)
def test_gates_have_the_gradient_of_their_definition(variant, rng):
  """The kernel's gradient along a direction is a difference in float64."""
  x = rng.normal(size=(BATCH, TIME, D_MODEL))
  kernel, direction = rng.normal(size=(2, D_MODEL, NUM_EXPERTS))
  bias = rng.normal(size=NUM_EXPERTS)
  up = rng.normal(size=(BATCH * TIME, NUM_EXPERTS))
  router, tokens = make(variant), jnp.zeros((BATCH, TIME), jnp.int32)
  mask = jnp.ones((BATCH, TIME), bool)

  def total(kernel, x, bias, up):
    params = {'params': {'kernel': kernel, 'noise': jnp.zeros_like(kernel)}}
    inputs = RouterInputs(tokens, mask, bias)
    routing = router.apply(params, x, inputs, train=False)
    token = routing.token
    row = jnp.arange(len(routing.expert)) if token is None else token
    return jnp.sum(routing.weight * up[row[:, None], routing.expert])

  with jax.enable_x64(True):
    gradient = QUICKLY(jax.grad(total))(kernel, x, bias, up)

  def by_hand(kernel):
    z = x.reshape(-1, D_MODEL) @ kernel
    return np.sum(DEFINITIONS[variant](z, bias)[0] * up)

  step = 1e-6 * direction
  slope = (by_hand(kernel + step) - by_hand(kernel - step)) / 2e-6
  assert abs(slope) > 1e-2
  found = np.sum(np.asarray(gradient) * direction)
  assert found == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_route_scale_multiplies_the_weights_alone(variant, x, tokens, params):
  """Experts, probabilities and losses are bitwise the same."""
  plain = route(make(variant), params, x, tokens)
  scaled = route(make(variant, route_scale=2.5), params, x, tokens)
  np.testing.assert_array_equal(scaled.weight, 2.5 * plain.weight)
  np.testing.assert_allclose(
    scaled.metrics['first_gate'].compute(),
    2.5 * plain.metrics['first_gate'].compute(),
    rtol=1e-6,
  )
  for name in ('expert', 'probs', 'load', 'losses'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(scaled, name), getattr(plain, name)
    )


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_route_scale_of_1_is_no_operation(variant, x, tokens, params):
  inputs = RouterInputs(tokens, jnp.ones(tokens.shape, bool))

  def program(router):
    run = functools.partial(router.apply, train=False)
    return str(jax.make_jaxpr(run)(params, x, inputs))

  assert program(make(variant, route_scale=1.0)) == program(make(variant))
  assert program(make(variant, route_scale=2.5)) != program(make(variant))


def test_the_bias_selects_and_does_not_weigh(x, tokens, params):
  bias = jnp.zeros(NUM_EXPERTS).at[3].set(10.0)
  biased = route(make('Sigmoid'), params, x, tokens, bias=bias)
  assert biased.load[3] == BATCH * TIME
  plain = route(make('Sigmoid'), params, x, tokens)
  np.testing.assert_allclose(biased.probs, plain.probs)
  assert gates(biased)[:, 3].max() < 1


def test_jitter_multiplies_by_a_uniform_number_when_training(params):
  """The logits reveal the jitter of an input of width 1."""
  router = make('Switch')
  num_tokens = 2000
  x = jnp.ones((1, num_tokens, 1))
  tokens = jnp.zeros((1, num_tokens), jnp.int32)
  kernel = params['params']['kernel'][:1]
  routing = route(
    router, {'params': {'kernel': kernel}}, x, tokens, key=jax.random.key(0)
  )
  log = np.log(routing.probs)
  factor = (log[:, 1] - log[:, 0]) / float(kernel[0, 1] - kernel[0, 0])
  assert 0.8 - 1e-4 < factor.min() < 0.81 and 1.19 < factor.max() < 1.2 + 1e-4
  np.testing.assert_allclose(factor.mean(), 1, atol=0.01)
  np.testing.assert_allclose(factor.std(), 0.4 / np.sqrt(12), rtol=0.05)


def test_noise_is_normal_and_as_wide_as_learned(x, params):
  router = make('NoisyTopK')
  num_tokens = 4000
  same = jnp.broadcast_to(x[:1, :1], (1, num_tokens, D_MODEL))
  tokens = jnp.zeros((1, num_tokens), jnp.int32)
  routing = route(router, params, same, tokens, key=jax.random.key(0))
  kernel, noise = (np.float64(w) for w in params['params'].values())
  row = np.float64(x[0, 0])
  width = np.log1p(np.exp(row @ noise))
  # Noisy logits, all less that of expert 0.
  log = np.log(np.float64(routing.probs))
  difference = (log - log[:, :1])[:, 1:]
  mean = row @ kernel
  expected = np.hypot(width, width[0])[1:]
  np.testing.assert_allclose(difference.std(axis=0), expected, rtol=0.05)
  error = difference.mean(axis=0) - (mean - mean[0])[1:]
  assert np.abs(error / expected).max() < 4 / np.sqrt(num_tokens)
  # Selected and weighed by the noisy logits.
  gate, _ = topk(log, None)
  np.testing.assert_allclose(
    gates(routing, num_tokens), gate, rtol=1e-3, atol=1e-6
  )


def test_hash_is_a_balanced_table_of_tokens(x, tokens):
  router = make('Hash', vocab_size=6 * NUM_EXPERTS + 1, seed=1)
  table = router.table()
  assert all(len(set(row)) == TOP_K for row in table.tolist())
  for rank in range(TOP_K):
    load = np.bincount(table[:, rank], minlength=NUM_EXPERTS)
    assert sorted(load) == [6] * (NUM_EXPERTS - 1) + [7]
  assert len({tuple(sorted(row)) for row in table.tolist()}) > NUM_EXPERTS
  other = make('Hash', vocab_size=6 * NUM_EXPERTS + 1, seed=2).table()
  assert (other != table).any()
  routing = route(router, {}, x, tokens)
  gate = gates(routing)
  for n, token in enumerate(np.ravel(tokens)):
    expected = np.bincount(table[token], minlength=NUM_EXPERTS) / TOP_K
    np.testing.assert_allclose(gate[n], expected)
    np.testing.assert_allclose(routing.probs[n], expected)


@pytest.mark.parametrize('capacity_factor', [0.5, 1.0, 20.0])
def test_capacity_factor_is_the_mean_number_of_experts(
  capacity_factor, x, tokens, params
):
  router = make('ExpertChoice', capacity_factor=capacity_factor)
  routing = route(router, params, x, tokens)
  capacity = min(round(capacity_factor * BATCH * TIME / 6 + 0.4), BATCH * TIME)
  assert (np.asarray(routing.load) == capacity).all()
  assert len(routing.expert) == NUM_EXPERTS * capacity


@pytest.fixture(
  scope='module', params=mostly_slow(VARIANTS, 'TopK', 'ExpertChoice')
)
def layer(request):
  """Returns a function of a dispatch's name, and its result for the oracle.

  The function returns value and gradients of a layer in training, with padding.
  """
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, VOCAB, (BATCH, TIME)), jnp.int32)
  inputs = RouterInputs(
    tokens, jnp.arange(BATCH * TIME).reshape(tokens.shape) < 22
  )

  def random(like):
    return jnp.asarray(rng.normal(size=like.shape), jnp.float32)

  make_layer = functools.partial(make_moe, request.param)
  x = random(np.zeros((BATCH, TIME, D_MODEL)))
  init = functools.partial(make_layer('dense').init, train=False)
  params = jax.tree.map(
    random, jax.eval_shape(init, jax.random.key(0), x, inputs)
  )

  def run(name):
    def loss(params, x):
      rngs = {'routing': jax.random.key(1)}
      y, aux = make_layer(name).apply(params, x, inputs, train=True, rngs=rngs)
      balance = losses.value(aux.losses['balance'])
      return jnp.sum(jnp.sin(y)) + balance, (y, aux.load)

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return QUICKLY(grad)(params, x)

  return run, run('dense')


@pytest.mark.parametrize(
  'name',
  [
    'dropless',
    *(pytest.param(n, marks=pytest.mark.slow) for n in ('capacity', 'grouped')),
  ],
)
def test_every_dispatch_equals_dense(layer, name):
  """Value, load and all gradients agree for each router."""
  run, expected = layer
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-4),
    run(name),
    expected,
  )
  assert jnp.abs(expected[0][1][0]).max() > 0.1


def test_rows_of_a_token_are_added_up(x, tokens, params, rng):
  """Rows by expert equal rows by token with E choices, some of them empty."""
  routing = route(make('ExpertChoice'), params, x, tokens)
  gate = jnp.asarray(gates(routing), jnp.float32)
  assert ((gate > 0).sum(axis=1) > 1).any()
  expert = jnp.where(gate > 0, jnp.arange(NUM_EXPERTS), NUM_EXPERTS)
  by_token = routing._replace(expert=expert, weight=gate, token=None)
  weights = experts.make(
    lambda name, init, shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
    D_MODEL,
    num_experts=NUM_EXPERTS,
    d_ff=4,
    activation='gelu',
    use_bias=True,
  )

  @QUICKLY
  def run(routing):
    flat = x.reshape(-1, D_MODEL)
    return dispatch_rows(dense, flat, routing, weights, 'float32')[0]

  np.testing.assert_allclose(run(routing), run(by_token), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('variant', 'arguments', 'words'),
  [
    ('Sigmoid', {'num_groups': 4}, 'num_groups=4 must divide num_experts=6'),
    ('Sigmoid', {'num_groups': 0}, 'num_groups=0 must'),
    ('Sigmoid', {'num_groups': 6}, 'groups_kept=1 must hold top_k=2'),
    ('Sigmoid', {'groups_kept': 2}, 'at most num_groups=1'),
    ('Sigmoid', {'bias_rate': -1.0}, 'bias_rate'),
    ('Switch', {'jitter': 1.0}, 'jitter=1.0 must'),
    ('ExpertChoice', {'capacity_factor': 0.0}, 'capacity_factor=0.0 must'),
    ('TopK', {'route_scale': 0.0}, 'route_scale=0.0 must'),
    ('Hash', {'route_scale': -1.0}, 'route_scale=-1.0 must'),
  ],
)
def test_arguments_that_mean_nothing(variant, arguments, words):
  with pytest.raises(ValueError, match=words):
    make(variant, **arguments)
