"""Every dispatch equals the dense oracle, in value and in gradient."""

import functools

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment
from nanomoe.config import schema
from nanomoe.moe import experts as experts_lib
from nanomoe.moe.dispatch import capacity, dense, dropless, grouped, registry
from nanomoe.moe.dispatch import plan as plan_lib
from nanomoe.moe.dispatch.registry import DISPATCH
from nanomoe.moe.routers import Routing
from nanomoe.ops.activations import ACTIVATIONS
from nanomoe.planning import products
from tests.shrunk import mostly_slow

pytestmark = pytest.mark.optimized

SPARSE = [name for name in DISPATCH if name != 'dense']
NUM_EXPERTS, D_MODEL, D_FF = 5, 8, 12


def _combine(name, capacity_factor=NUM_EXPERTS):
  """Returns a dispatch; by default its capacity is never exceeded."""
  keys = {'capacity_factor': float(capacity_factor)}
  return registry.build(name, keys)


@functools.cache
def _value_and_gradients(name, capacity_factor=NUM_EXPERTS):
  """Returns a compiled `(inputs, direction) -> (y, metrics), gradients`."""
  combine = _combine(name, capacity_factor)

  def run(x, routing, experts, direction):
    def loss(x, weight, experts):
      routed = routing._replace(weight=weight)
      y, metrics = combine(x, routed, experts, 'float32')
      return jnp.sum(y * direction), (y, metrics)

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return grad(x, routing.weight, experts)[::-1]

  return jax.jit(run)


def _assert_close(actual, expected):
  ((y, _), grads), ((expected_y, _), expected_grads) = actual, expected
  np.testing.assert_allclose(y, expected_y, rtol=1e-4, atol=1e-4)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3),
    grads,
    expected_grads,
  )


def _experts(
  rng,
  num_experts=NUM_EXPERTS,
  d_model=D_MODEL,
  d_ff=D_FF,
  activation='gelu',
  use_bias=True,
):
  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return experts_lib.make(
    lambda name, init, shape: draw(*shape),
    d_model,
    num_experts=num_experts,
    d_ff=d_ff,
    activation=activation,
    use_bias=use_bias,
  )


def _routing(expert, rng, num_experts=NUM_EXPERTS):
  expert = jnp.asarray(expert, jnp.int32)
  weight = jnp.asarray(rng.uniform(0.1, 1, expert.shape), jnp.float32)
  probs = jnp.full((len(expert), num_experts), 1 / num_experts)
  load = jnp.sum(expert[..., None] == jnp.arange(num_experts), axis=(0, 1))
  return Routing(expert, weight, probs, load, {}, {})


def _choices(kind: str, top_k: int, rng) -> np.ndarray:
  """Returns experts [N, K], different in each row; E is padding."""
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


@pytest.mark.parametrize(
  'top_k', mostly_slow(range(1, NUM_EXPERTS + 1), 1, 2, NUM_EXPERTS)
)
@pytest.mark.parametrize(
  'kind', ['random', 'one expert', 'one row', 'padding', 'all padding']
)
@pytest.mark.parametrize('name', SPARSE)
def test_equals_dense(name, kind, top_k, rng):
  routing = _routing(_choices(kind, top_k, rng), rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  inputs = x, routing, _experts(rng), direction
  expected = _value_and_gradients('dense')(*inputs)
  actual = _value_and_gradients(name)(*inputs)
  _assert_close(actual, expected)
  for (_, metrics), _ in (actual, expected):
    assert metrics['dropped_fraction'] == (0, np.sum(routing.load))
  if kind != 'all padding':
    assert float(jnp.abs(expected[0][0]).max()) > 0.1


@pytest.mark.parametrize('use_bias', mostly_slow([False, True], True))
@pytest.mark.parametrize('activation', ACTIVATIONS)
@pytest.mark.parametrize('name', SPARSE)
def test_equals_dense_whatever_the_experts(name, activation, use_bias, rng):
  routing = _routing(_choices('random', 2, rng), rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  experts = _experts(rng, activation=activation, use_bias=use_bias)
  inputs = x, routing, experts, direction
  expected = _value_and_gradients('dense')(*inputs)
  _assert_close(_value_and_gradients(name)(*inputs), expected)


@pytest.mark.parametrize('kind', ['skewed', 'full', 'one row'])
@pytest.mark.parametrize('num_experts', [64, 128])
@pytest.mark.parametrize(
  'precision',
  ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)],
)
def test_dropless_equals_dense_for_fine_grained_experts(
  precision, num_experts, kind, rng
):
  """Loads: empty, one row, exactly full, and many times the balanced one."""
  top_k, num_tokens = 8, 4 * num_experts
  turns = np.arange(num_tokens)[:, None] + np.arange(top_k)
  expert = turns % num_experts  # Balanced: every expert is full.
  if kind == 'skewed':  # Popular experts, and several without a token.
    popularity = rng.gumbel(size=(num_tokens, num_experts))
    popularity -= 0.2 * np.arange(num_experts)
    expert = popularity.argsort(axis=1)[:, -top_k:]
  if kind == 'one row':  # Half of the experts are empty, and one has one row.
    expert = turns % (num_experts // 2)
    expert[0, 0] = num_experts - 1
  load = np.bincount(expert.ravel(), minlength=num_experts)
  assert kind == 'full' or (load.min() == 0 and load.max() > 4 * top_k)
  routing = _routing(expert, rng, num_experts)
  experts = _experts(rng, num_experts, activation='swiglu', use_bias=False)
  x = jnp.asarray(rng.normal(size=(num_tokens, D_MODEL)), jnp.float32)
  direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  inputs = x, routing, experts, direction
  expected = _value_and_gradients('dense')(*inputs)
  if precision == 'float32':
    _assert_close(_value_and_gradients('dropless')(*inputs), expected)
    return

  def loss(x, weight, experts):
    routed = routing._replace(weight=weight)
    y, _ = dropless.dropless(x, routed, experts, 'bfloat16')
    return jnp.sum(y * direction)

  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  for actual, exact in zip(
    jax.tree.leaves(grads(x, routing.weight, experts)),
    jax.tree.leaves(expected[1]),
    strict=True,
  ):
    error = jnp.linalg.norm(actual - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.02


def _num_elements(fn, *args) -> int:
  """Returns the elements of all intermediate results of a traced program."""

  def count(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
      inner = sum(map(count, jax_core.jaxprs_in_params(equation.params)))
      times = equation.params.get('length', 1)
      total += times * inner + sum(v.aval.size for v in equation.outvars)
    return total

  return count(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.mark.parametrize('make', [plan_lib.make_plan, grouped.make_groups])
def test_work_of_a_plan_grows_with_assignments_not_with_experts(make):
  """Doubling assignments doubles it; 16 times the experts add little."""

  def elements(num_tokens, num_experts):
    expert = jnp.zeros((num_tokens, 8), jnp.int32)
    return _num_elements(lambda e: make(e, num_experts), expert)

  few, more, double = (
    elements(4096, 8),
    elements(4096, 128),
    elements(8192, 128),
  )
  assert more < 1.3 * few
  assert 1.9 * more < double < 2.1 * more


@pytest.mark.slow
@pytest.mark.parametrize('num_experts', [1, 64])
@pytest.mark.parametrize('name', SPARSE)
def test_equals_dense_for_few_and_for_many_experts(name, num_experts, rng):
  """One expert, or more experts than two tokens choose."""
  for num_tokens in (2, 203):
    expert = rng.integers(0, num_experts, (num_tokens, 1))
    routing = _routing(expert, rng, num_experts)
    x = jnp.asarray(rng.normal(size=(num_tokens, D_MODEL)), jnp.float32)
    direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    inputs = x, routing, _experts(rng, num_experts), direction
    expected = _value_and_gradients('dense', num_experts)(*inputs)
    _assert_close(_value_and_gradients(name, num_experts)(*inputs), expected)


def test_dense_equals_a_loop_over_tokens(rng):
  """The oracle agrees with the definition in float64."""
  routing = _routing(_choices('padding', 2, rng), rng)
  experts = _experts(rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  y, _ = dense.dense(x, routing, experts, 'float32')
  w_in, b_in, w_out, b_out = (
    np.float64(w)
    for w in (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
  )
  expert, weights, x, y = map(
    np.asarray, (routing.expert, routing.weight, x, y)
  )

  def gelu(z):
    inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    return 0.5 * z * (1 + np.tanh(inner))

  for t in range(len(x)):
    expected = np.zeros(D_MODEL)
    for e, weight in zip(expert[t], weights[t], strict=True):
      if e < NUM_EXPERTS:
        hidden = gelu(np.float64(x[t]) @ w_in[e] + b_in[e])
        expected += float(weight) * (hidden @ w_out[e] + b_out[e])
    np.testing.assert_allclose(y[t], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', SPARSE)
def test_bfloat16_is_close(name, rng):
  routing = _routing(_choices('random', 2, rng), rng)
  experts = _experts(rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  exact, _ = dense.dense(x, routing, experts, 'float32')
  combine = jax.jit(_combine(name), static_argnums=3)
  rounded, _ = combine(x, routing, experts, 'bfloat16')
  error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
  assert 0 < error < 0.02


@pytest.mark.parametrize('chunk_size', mostly_slow([1, 3, 4], 3))
@pytest.mark.parametrize('kind', ['random', 'one expert'])
def test_bfloat16_gradients_are_close(kind, chunk_size, rng, monkeypatch):
  """The gradients are close for every number of experts in a chunk."""
  monkeypatch.setattr(dropless, 'chunk_size', lambda *_: chunk_size)
  expert = rng.random((203, 4)).argsort(axis=1)[:, :2]
  if kind == 'one expert':
    expert[:] = [1, 3]
  routing, experts = _routing(expert, rng, 4), _experts(rng, 4)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

  def loss(x, weight, experts):
    routed = routing._replace(weight=weight)
    y, _ = dropless.dropless(x, routed, experts, 'bfloat16')
    return jnp.sum(y * direction)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  _, exact = _value_and_gradients('dense', 4)(x, routing, experts, direction)
  for actual, expected in zip(
    jax.tree.leaves(grad(x, routing.weight, experts)),
    jax.tree.leaves(exact),
    strict=True,
  ):
    error = jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.02


@pytest.mark.parametrize('num_experts', mostly_slow([4, 8, 64], 4))
@pytest.mark.parametrize('name', SPARSE)
def test_computes_the_chosen_experts_only(name, num_experts, rng):
  """A row costs 2 products, and 4 for the gradient.

  An overflow row costs its first product again; these rows are few.
  """
  n, top_k, d_model, d_ff = 4096, 2, 16, 32
  expert = rng.random((n, num_experts)).argsort(axis=1)[:, :top_k]
  routing = _routing(expert, rng, num_experts)
  experts = _experts(rng, num_experts, d_model, d_ff, use_bias=False)
  x = jnp.ones((n, d_model))
  trips, over = None, 0
  if name == 'dropless':
    overflow = plan_lib.make_plan(routing.expert, num_experts).overflow
    trips = int(overflow.num_trips)
    over = trips * overflow.assignment[0].size
    assert 0 < over < 0.27 * n * top_k

  def loss(x, weight, experts):
    routed = routing._replace(weight=weight)
    return _combine(name, 1.0)(x, routed, experts, 'float32')[0].sum()

  rows, product = n * top_k, 2 * d_model * d_ff
  forward = products.count(loss, x, routing.weight, experts, trips=trips)
  assert forward == 2 * product * (rows + over)
  grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
  counted = products.count(grad, x, routing.weight, experts, trips=trips)
  # The gradient of the weights sums the hidden layer by a product.
  sums = 2 * d_ff * (rows + over) if name == 'dropless' else 0
  assert counted == product * (6 * rows + 7 * over) + sums


@pytest.mark.parametrize('num_tokens', [1, 2, 7, 64, 1000])
@pytest.mark.parametrize('kind', ['random', 'one expert'])
def test_plan_gives_each_assignment_a_row_of_its_expert(kind, num_tokens, rng):
  """The row is a slot of the expert, or an overflow row that is computed."""
  expert = rng.integers(0, NUM_EXPERTS + 1, (num_tokens, 3))
  if kind == 'one expert':
    expert[:] = 2
  make_plan = jax.jit(plan_lib.make_plan, static_argnums=1)
  plan = jax.device_get(make_plan(jnp.int32(expert), NUM_EXPERTS))
  placed = []
  _, size = plan.assignment_of_slot.shape
  for slot, assignment in enumerate(plan.assignment_of_slot.flat):
    if assignment < expert.size:
      assert plan.slot.flat[assignment] == slot
      placed.append((int(assignment), slot // size))
  overflow, trips = plan.overflow, int(plan.overflow.num_trips)
  assert (overflow.assignment[trips:] == expert.size).all()
  _, blocks, size = overflow.assignment.shape
  load = np.bincount(expert.flat, minlength=NUM_EXPERTS)[:NUM_EXPERTS]
  needed = -(-np.maximum(load - plan.assignment_of_slot.shape[1], 0) // size)
  assert trips == -(-needed.sum() // blocks)
  for rows, own in zip(
    overflow.assignment[:trips].reshape(-1, size),
    overflow.expert[:trips].flat,
    strict=True,
  ):
    for assignment in rows[rows < expert.size]:
      assert plan.slot.flat[assignment] >= plan.assignment_of_slot.size
      placed.append((int(assignment), int(own)))
  chosen = [(i, e) for i, e in enumerate(expert.flat) if e < NUM_EXPERTS]
  assert sorted(placed) == chosen


@pytest.mark.parametrize(
  ('heaviest', 'trips'), [(1024, 0), (1025, 1), (1281, 2), (4096, 12)]
)
def test_as_many_trips_as_what_is_over_an_even_load_needs(heaviest, trips):
  """An iteration has 256 rows; 4 experts share 4096 assignments."""
  others = np.arange(4096 - heaviest) % 3 + 1
  expert = jnp.asarray([0] * heaviest + list(others), jnp.int32)
  plan = plan_lib.make_plan(expert.reshape(-1, 2), 4)
  assert plan.overflow.num_trips == trips


@pytest.mark.parametrize('kind', ['one row', 'padding', 'all padding'])
def test_groups_are_the_assignments_sorted_by_expert(kind, rng):
  """Padding has no row, yet every row belongs to a group."""
  expert = _choices(kind, 2, rng)
  slot, sizes = grouped.make_groups(jnp.asarray(expert), NUM_EXPERTS)
  flat = expert.ravel()
  order = np.argsort(flat, kind='stable')[: np.sum(flat < NUM_EXPERTS)]
  expected = np.full(flat.shape, flat.size)
  expected[order] = np.arange(len(order))
  np.testing.assert_array_equal(slot.ravel(), expected)
  load = np.bincount(flat, minlength=NUM_EXPERTS + 1)
  load[-2] += load[-1]
  np.testing.assert_array_equal(sizes, load[:-1])


def _kept_by_definition(expert, size):
  """Keeps first choices of all tokens, then second ones, while there is room.

  Returns the mask [N, K], and each expert's assignments in order.
  """
  kept, taken = np.zeros(expert.shape, bool), {}
  for k in range(expert.shape[1]):
    for t in range(len(expert)):
      rows = taken.setdefault(expert[t, k], [])
      if expert[t, k] < NUM_EXPERTS and len(rows) < size:
        rows.append((t, k))
        kept[t, k] = True
  return kept, taken


@pytest.mark.parametrize('capacity_factor', [0.01, 0.5])
@pytest.mark.parametrize('kind', ['random', 'one expert', 'padding'])
def test_capacity_equals_dense_without_what_is_dropped(
  kind, capacity_factor, rng
):
  """Values, gradients, order within an expert and dropped fraction agree."""
  expert = _choices(kind, 3, rng)
  size = int(np.ceil(capacity_factor * expert.size / NUM_EXPERTS))
  kept, taken = _kept_by_definition(expert, size)
  assert not kept.all()
  slot = capacity.make_slots(jnp.asarray(expert), NUM_EXPERTS, size)
  for e in range(NUM_EXPERTS):
    for rank, (t, k) in enumerate(taken.get(e, [])):
      assert slot[t, k] == e * size + rank
  assert (slot[~kept] == NUM_EXPERTS * size).all()

  routing, experts = _routing(expert, rng), _experts(rng)
  x = jnp.asarray(rng.normal(size=(203, D_MODEL)), jnp.float32)
  direction = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
  actual = _value_and_gradients('capacity', capacity_factor)(
    x, routing, experts, direction
  )
  some = routing._replace(expert=jnp.where(kept, expert, NUM_EXPERTS))
  _assert_close(
    actual, _value_and_gradients('dense')(x, some, experts, direction)
  )
  dropped = actual[0][1]['dropped_fraction']
  chosen = (expert < NUM_EXPERTS).sum()
  assert dropped == (chosen - kept.sum(), chosen)


@pytest.mark.parametrize('name', DISPATCH)
def test_causal_is_what_does_not_see_later_tokens(name, rng):
  """The last 20 tokens and their experts change; 183 earlier tokens do not."""
  experts, end = _experts(rng), 183
  x, other_x = jnp.asarray(rng.normal(size=(2, 203, D_MODEL)), jnp.float32)
  routing, other = (_routing(_choices('random', 3, rng), rng) for _ in range(2))
  other_x = other_x.at[:end].set(x[:end])
  other = jax.tree.map(
    lambda a, b: b.at[:end].set(a[:end]) if len(b) == 203 else b, routing, other
  )
  run = _value_and_gradients(name, 1.0)
  (y, _), _ = run(x, routing, experts, x)
  (other_y, _), _ = run(other_x, other, experts, x)
  same = np.allclose(y[:end], other_y[:end], atol=1e-5)
  assert same == DISPATCH[name].causal
  assert not np.allclose(y[end:], other_y[end:], atol=1e-5)


def test_every_dispatch_can_be_chosen():
  assert set(schema.FIELDS['moe.dispatch'].choices) == {'auto', *DISPATCH}


@pytest.mark.parametrize(
  ('backend', 'expected'), [('cpu', 'dropless'), ('gpu', 'grouped')]
)
def test_auto_depends_on_the_backend_alone(backend, expected, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  assert registry.resolve_dispatch('auto') == expected
  assert registry.resolve_dispatch('dense') == 'dense'


@pytest.mark.slow
def test_the_capacity_of_a_model_is_the_configs(tiny, rng):
  """Each of 4 experts has one row for 64 tokens with two choices."""
  config = tiny(
    {
      'moe.dispatch': 'capacity',
      'moe.capacity_factor': 1e-6,
      'model.num_layers': 1,
    }
  )
  task = experiment.build_task(experiment.resolve_auto(config), 11)
  batch = {
    name: jnp.asarray(rng.integers(0, 11, (4, 16)), jnp.int32)
    for name in ('inputs', 'targets')
  }
  batch['weights'] = jnp.ones((4, 16))

  @jax.jit
  def run(key):
    params, model_state = task.init(key, batch)
    _, aux = task.loss(params, model_state, batch, key, train=False)
    return aux.metrics

  metrics = run(jax.random.key(0))
  np.testing.assert_array_equal(metrics['dropped_fraction'], [[124], [128]])


@pytest.mark.parametrize(
  ('in_cache', 'num_experts', 'expected'),
  [(1, 4, 4), (0.9, 4, 2), (3, 16, 3), (0.5, 4, 2), (0.5, 72, 6)],
)
def test_a_chunk_fits_the_cache_or_is_a_twelfth_of_the_experts(
  in_cache, num_experts, expected
):
  expert_bytes = int(dropless.CACHE_BYTES / in_cache)
  assert dropless.chunk_size(expert_bytes, num_experts) == expected


def test_a_gpu_computes_all_experts_in_one_chunk(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert dropless.chunk_size(dropless.CACHE_BYTES, 4) == 4
