"""Schedules at points computed by hand; optimizers by their equations."""

import inspect

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from nanomoe import experiment, optimizers, schedules
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema
from trainers.errors import UserError

PEAK = 0.5
STEPS = 1000


def built(changes):
  """Returns base.py's optimizer and schedule with changes, for STEPS steps."""
  overrides = [(f'optimizer.{k}', str(v)) for k, v in changes.items()]
  config = config_lib.apply(base.get_config(), overrides)
  return optimizers.build(config.optimizer, STEPS)


def schedule(kind, **arguments):
  arguments = {f'schedule.{k}': v for k, v in arguments.items()}
  changes = {'learning_rate': PEAK, 'schedule.type': kind, **arguments}
  return built(changes)[1]


@pytest.mark.parametrize(
  'kind, arguments, points',
  [
    ('constant', {}, {0: 1, 500: 1, 1000: 1, 2000: 1}),
    (
      # Half a cosine from 200 to 1000: at 400, (1 + cos(pi / 4)) / 2 of it.
      'warmup_cosine',
      dict(warmup_steps=200, final_fraction=0.2),
      {
        0: 0,
        50: 0.25,
        200: 1,
        400: 0.2 + 0.8 * (1 + 0.5**0.5) / 2,
        600: 0.6,
        1000: 0.2,
        1500: 0.2,
      },
    ),
    (
      'linear',
      dict(warmup_steps=200, final_fraction=0.2),
      {0: 0, 50: 0.25, 200: 1, 400: 0.8, 600: 0.6, 1000: 0.2, 1500: 0.2},
    ),
    (
      'wsd',
      dict(warmup_steps=200, decay_steps=400, final_fraction=0.2),
      {0: 0, 50: 0.25, 200: 1, 400: 1, 600: 1, 700: 0.8, 800: 0.6, 1000: 0.2},
    ),
    ('linear', dict(warmup_steps=0), {0: 1, 500: 0.5, 1000: 0}),
    ('warmup_cosine', dict(warmup_steps=0), {0: 1, 500: 0.55, 1000: 0.1}),
    # All of it is warm-up, or there is no room for the stable part.
    ('warmup_cosine', dict(warmup_steps=2000), {0: 0, 500: 0.25, 1000: 0.5}),
    ('linear', dict(warmup_steps=2000), {0: 0, 500: 0.25, 1000: 0.5}),
    ('wsd', dict(warmup_steps=2000), {0: 0, 500: 0.25, 1000: 0.5}),
  ],
)
def test_schedules(kind, arguments, points):
  rate = schedule(kind, **arguments)
  for step, share in points.items():
    got = float(rate(jnp.int32(step)))
    assert got == pytest.approx(share * PEAK, abs=1e-6), step


@pytest.mark.parametrize('kind', schedules.SCHEDULES)
def test_a_schedule_never_exceeds_the_learning_rate(kind):
  rates = jax.vmap(schedule(kind))(jnp.arange(STEPS + 100))
  rates = np.broadcast_to(rates, STEPS + 100)
  assert rates.max() == pytest.approx(PEAK)
  assert rates.min() >= 0


def test_mistakes_in_a_schedule_are_reported_together():
  with pytest.raises(UserError) as error:
    schedule('wsd', warmup=10, final_fracton=0.1)
  one, other = sorted(error.value.problems)
  assert 'optimizer.schedule.final_fracton' in one
  assert "'final_fraction'" in one
  assert 'optimizer.schedule.warmup' in other
  assert "'warmup_steps'" in other
  with pytest.raises(UserError, match=r'optimizer\.schedule.*warmup_cosine'):
    schedule('warmup_cosin')


@pytest.mark.parametrize('value', ['ten', '1e999', 'None', '[1]'])
def test_an_argument_of_the_wrong_type_is_reported(value):
  with pytest.raises(UserError, match=r'optimizer\.schedule\.warmup_steps'):
    schedule('wsd', warmup_steps=value)


# AdamW.


def adamw(params, grads, rates, *, beta1, beta2, decay, clip=0.0):
  """Returns parameters after AdamW's updates; `decay` is per parameter.

  Loshchilov and Hutter 2019, algorithm 2.
  """
  params = {k: np.array(v, np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(v) for k, v in params.items()}
  for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grad.values()))
    scale = min(1.0, clip / norm) if clip else 1.0
    for k, g in grad.items():
      g = scale * np.array(g, np.float64)
      m[k] = beta1 * m[k] + (1 - beta1) * g
      v[k] = beta2 * v[k] + (1 - beta2) * g**2
      m_hat, v_hat = m[k] / (1 - beta1**t), v[k] / (1 - beta2**t)
      update = m_hat / (np.sqrt(v_hat) + 1e-8) + decay[k] * params[k]
      params[k] -= rate * update
  return params


def trained(optimizer, params, grads):
  """Returns `params` after an update for each of `grads`, by path.

  The table of parameters knows a parameter by its path.
  """
  params, *grads = (
    traverse_util.unflatten_dict(tree, sep='/') for tree in (params, *grads)
  )

  @jax.jit
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for g in grads:
    params, state = step(params, state, g)
  return traverse_util.flatten_dict(params, sep='/')


@pytest.fixture
def problem():
  """Parameters, and four gradients whose norms differ a thousandfold."""
  rng = np.random.default_rng(0)
  shapes = {
    'head/kernel': (3, 4),
    'head/bias': (4,),
    'block_0/moe/b_in': (2, 4),
  }

  def draw(size):
    return {
      k: (size * rng.standard_normal(s)).astype(np.float32)
      for k, s in shapes.items()
    }

  return draw(1), [draw(size) for size in (0.1, 10, 0.01, 1)]


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'beta1': 0.5, 'beta2': 0.9, 'weight_decay': 0.3},
    {'beta1': 0, 'beta2': 0, 'weight_decay': 0},
    {'clip_norm': 1.5, 'beta1': 0.8, 'beta2': 0.95},
    {'decay_mask': 'matrices', 'weight_decay': 0.7},
  ],
  ids=str,
)
def test_four_steps_of_adamw(problem, changes):
  params, grads = problem
  changes = {'learning_rate': 0.01, **changes}
  optimizer, _ = built(changes)
  decay = dict.fromkeys(params, changes.get('weight_decay', 0.1))
  if 'decay_mask' in changes:
    decay.update({'head/bias': 0, 'block_0/moe/b_in': 0})
  expected = adamw(
    params,
    grads,
    [0.01] * 4,
    beta1=changes.get('beta1', 0.9),
    beta2=changes.get('beta2', 0.999),
    decay=decay,
    clip=changes.get('clip_norm', 0.0),
  )
  got = trained(optimizer, params, grads)
  for k in params:
    np.testing.assert_allclose(got[k], expected[k], rtol=2e-5, atol=2e-6)


def test_a_schedule_sets_the_rate_of_each_update(problem):
  """Update t = 0, 1, ... has the rate of t, which scales the decay too."""
  params, grads = problem
  optimizer, rate = built(
    {
      'learning_rate': 0.01,
      'schedule.type': 'linear',
      'schedule.warmup_steps': 2,
    }
  )
  rates = [0.0, 0.005, 0.01, 0.01 * 997 / 998]
  np.testing.assert_allclose([rate(t) for t in range(4)], rates, rtol=1e-6)
  decay = dict.fromkeys(params, 0.1)
  expected = adamw(params, grads, rates, beta1=0.9, beta2=0.999, decay=decay)
  got = trained(optimizer, params, grads)
  for k in params:
    np.testing.assert_allclose(got[k], expected[k], rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize('kind', optimizers.OPTIMIZERS)
@pytest.mark.parametrize('mask', optimizers.DECAY_MASKS)
def test_what_decays_in_the_model(tiny, mask, kind):
  """Without a gradient, an update is the decay alone."""
  config = experiment.resolve_auto(tiny())
  task = experiment.build_task(config, vocab_size=20)
  inputs = np.zeros((1, config.block_size), np.int32)
  shapes, _ = jax.eval_shape(task.init, jax.random.key(0), {'inputs': inputs})
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  optimizer, _ = built(
    {
      'type': kind,
      'decay_mask': mask,
      'weight_decay': 0.5,
      'learning_rate': 0.1,
    }
  )
  grads = jax.tree.map(np.zeros_like, params)
  state = optimizer.init(params)
  updates, _ = jax.jit(optimizer.update)(grads, state, params)
  decayed = set()
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    assert np.ptp(update) == 0
    amount = float(np.ravel(update)[0])
    if amount:
      assert amount == pytest.approx(-0.05)  # -0.1 * 0.5 * 1
      decayed.add(jax.tree_util.keystr(path[-1:], simple=True))
  matrices = {'kernel', 'w_in', 'w_out'}
  others = {'bias', 'scale', 'b_in', 'b_out'} | {
    'token_embedding',
    'position_embedding',
  }
  assert decayed == (matrices if mask == 'matrices' else matrices | others)


# The other optimizers.


def directions_of_lion(grads, *, beta1, beta2):
  """Yields the sign of the interpolated momentum. Chen et al. 2023."""
  m = 0
  for g in grads:
    yield np.sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g


def directions_of_adafactor(grads, *, beta1, beta2):
  """Yields updates of Shazeer and Stern 2018, with Zhai et al. 2021's changes.

  Algorithms 4 and 5.
  """
  m = row = column = full = 0
  for t, g in enumerate(grads, start=1):
    beta = min(beta2, 1 - t**-0.8)
    full = beta * full + (1 - beta) * g**2
    row = beta * row + (1 - beta) * np.sum(g**2, axis=-1, keepdims=True)
    column = beta * column + (1 - beta) * np.sum(g**2, axis=-2, keepdims=True)
    v = row * column / np.sum(row, axis=-2, keepdims=True)
    u = g / np.sqrt(v if min(g.shape[-2:]) >= 128 else full)
    u /= max(1, np.sqrt(np.mean(u**2)))
    m = beta1 * m + (1 - beta1) * u
    yield m


def directions_of_muon(grads, *, beta=0.95):
  """Yields Muon's updates of one matrix, by five quintic steps.

  Jordan et al. 2024; Liu et al. 2025 for their size.
  """
  m = 0
  for t, g in enumerate(grads, start=1):
    m = beta * m + (1 - beta) * g
    x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    x = x / np.linalg.norm(x)
    for _ in range(5):
      a = x @ x.T
      x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    yield 0.2 * np.sqrt(max(g.shape)) * x


def by_definition(directions, params, grads, *, rate, decay):
  """Returns `params` after an update along each direction, with decay."""
  p = np.array(params, np.float64)
  for d in directions([np.array(g, np.float64) for g in grads]):
    p = p - rate * (d + decay * p)
  return p


def draw(*shape, num=4):
  """Returns random parameters of a shape, and gradients."""
  rng = np.random.default_rng(sum(shape))
  arrays = rng.standard_normal((num + 1, *shape)).astype(np.float32)
  return arrays[0], list(arrays[1:])


@pytest.mark.parametrize(
  'kind, directions, shape',
  [
    ('Lion', directions_of_lion, (3, 4)),
    ('Adafactor', directions_of_adafactor, (3, 4)),
    ('Adafactor', directions_of_adafactor, (2, 128, 130)),  # Factored.
  ],
)
def test_four_steps_of(kind, directions, shape):
  changes = {'type': kind, 'learning_rate': 0.01, 'weight_decay': 0.3}
  optimizer, _ = built({**changes, 'beta1': 0.8, 'beta2': 0.5})
  params, grads = draw(*shape)
  expected = by_definition(
    lambda g: directions(g, beta1=0.8, beta2=0.5),
    params,
    grads,
    rate=0.01,
    decay=0.3,
  )
  got = trained(optimizer, {'w': params}, [{'w': g} for g in grads])['w']
  np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('shape', [(4, 6), (6, 4)])
def test_muon_takes_each_expert_by_itself(shape):
  """An expert is updated like a single matrix, as defined and as in Optax."""
  changes = {'type': 'Muon', 'learning_rate': 0.01, 'weight_decay': 0.3}
  optimizer, _ = built(changes)
  params, grads = draw(3, *shape)
  grads[1][2] *= 1e-3  # An expert with few tokens.
  w_in = 'block_0/moe/w_in'
  got = trained(optimizer, {w_in: params}, [{w_in: g} for g in grads])[w_in]
  alone = optax.contrib.muon(0.01, weight_decay=0.3, consistent_rms=0.2)
  for e in range(3):
    expert_grads = [g[e] for g in grads]
    expected = by_definition(
      directions_of_muon, params[e], expert_grads, rate=0.01, decay=0.3
    )
    np.testing.assert_allclose(got[e], expected, rtol=1e-4, atol=1e-5)
    by_optax = trained(
      alone, {'w': params[e]}, [{'w': g} for g in expert_grads]
    )
    np.testing.assert_allclose(got[e], by_optax['w'], rtol=1e-4, atol=1e-5)
  optimizer, _ = built({**changes, 'muon_beta': 0.5})
  other = trained(optimizer, {w_in: params}, [{w_in: g} for g in grads])[w_in]
  assert not np.allclose(other, got, atol=1e-4)


def test_muon_is_adamw_for_all_but_hidden_matrices(tiny):
  config = experiment.resolve_auto(tiny({'model.num_layers': 1}))
  task = experiment.build_task(config, vocab_size=20)
  inputs = {'inputs': np.zeros((1, 16), np.int32)}
  shapes, _ = jax.eval_shape(task.init, jax.random.key(0), inputs)
  leaves, structure = jax.tree.flatten(shapes)
  drawn = [draw(*leaf.shape, num=2) for leaf in leaves]
  params = structure.unflatten([p for p, _ in drawn])
  grads = [structure.unflatten([g[i] for _, g in drawn]) for i in (0, 1)]
  muon = trained(built({'type': 'Muon'})[0], params, grads)
  adam = trained(built({})[0], params, grads)
  same = {
    path.removeprefix('block_0/')
    for path in muon
    if np.allclose(muon[path], adam[path], rtol=1e-6, atol=1e-7)
  }
  assert same == {
    *('token_embedding', 'position_embedding', 'head/kernel', 'head/bias'),
    *('final_norm/scale', 'final_norm/bias'),
    *('attention_norm/scale', 'attention_norm/bias'),
    *('feed_forward_norm/scale', 'feed_forward_norm/bias'),
    *('attention/qkv/bias', 'attention/out/bias', 'moe/b_in', 'moe/b_out'),
  }


@pytest.mark.parametrize('kind', optimizers.OPTIMIZERS)
def test_finds_a_matrix(kind, rng):
  """Least squares with a known solution, at one learning rate for all."""
  x = rng.standard_normal((64, 8)).astype(np.float32)
  wanted = rng.standard_normal((8, 4)).astype(np.float32)
  changes = {'learning_rate': 0.05, 'schedule.type': 'linear'}
  optimizer, _ = built({**changes, 'type': kind, 'weight_decay': 0})

  def loss(params):
    kernel = params['block_0']['attention']['out']['kernel']
    return jnp.sum((x @ (kernel - wanted)) ** 2)

  @jax.jit
  def fit(kernel):
    def step(_, carry):
      params, state = carry
      grads = jax.grad(loss)(params)
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    params = {'block_0': {'attention': {'out': {'kernel': kernel}}}}
    carry = params, optimizer.init(params)
    return jax.lax.fori_loop(0, STEPS, step, carry)[0]

  params = fit(np.zeros_like(wanted))
  [kernel] = jax.tree.leaves(params)
  np.testing.assert_allclose(kernel, wanted, atol=2e-3)


def test_the_schema_knows_the_arguments_of_each_optimizer():
  supplied = {'learning_rate', 'weight_decay', 'mask', 'beta1', 'beta2'}
  assert {
    name: tuple(
      p for p in inspect.signature(make).parameters if p not in supplied
    )
    for name, make in optimizers.OPTIMIZERS.items()
  } == schema.OPTIMIZER_ARGUMENTS


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'muon_beta': 0.9}, "'optimizer.muon_beta'"),
    ({'type': 'Muon', 'muon_bta': 0.9}, "Did you mean 'optimizer.muon_beta'"),
    ({'type': 'Muon', 'muon_beta': 'x'}, "muon_beta='x': "),
    ({'type': 'Muon', 'muon_beta': 1.0}, 'muon_beta=1.0 must be >= 0 and < 1'),
    ({'type': 'Moun'}, "Did you mean 'Muon'"),
  ],
)
def test_mistakes_of_an_optimizer_are_reported(changes, words):
  with pytest.raises(UserError) as error:
    built(changes)
  (line,) = error.value.problems
  assert words in line


@pytest.mark.parametrize('kind', optimizers.OPTIMIZERS)
def test_what_a_run_may_change_does_not_rename_the_saved_state(kind):
  """A resumed run may change optimizer.*, and finds its arrays by name."""

  def names(**changes):
    optimizer, _ = built({'type': kind, **changes})
    state = optimizer.init({'head': {'kernel': np.ones((2, 2), np.float32)}})
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]

  plain = names()
  assert names(learning_rate=1, weight_decay=0, beta1=0.5) == plain
  assert names(**{'schedule.type': 'wsd'}) == plain
  assert names(decay_mask='matrices') == plain
  assert names(clip_norm=1.0) == plain
