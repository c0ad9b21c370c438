"""Starting a model with experts from a dense run."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema
from nanomoe.model import parameters, upcycled_experts, upcycling
from nanomoe.model.build import build_router
from nanomoe.moe.routing import RouterInputs
from nanomoe.task import build_task
from tests import routed
from tests.shrunk import mostly_slow
from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import reader
from trainers.errors import UserError

VOCAB, WIDTH = 13, 24
SMALL = {
  'init_from': '/dense',
  'batch_size': 2,
  'block_size': 8,
  'model.d_model': 16,
  'model.num_layers': 2,
  'model.num_heads': 2,
  'moe.num_experts': 4,
  'moe.d_ff': WIDTH,
  'moe.dense_d_ff': WIDTH,
  'moe.dispatch': 'dense',
  'precision': 'float32',
}
DENSE = {'moe.first_dense_layers': 2, 'init_from': ''}
SWIGLU = {'moe.activation': 'swiglu', 'model.bias': False}
SOFTMAX = {'moe.router.type': 'Softmax', 'moe.router.renormalize': True}
COPIES = {'upcycle.type': 'Copies'}
GROUPS = {'upcycle.type': 'VirtualGroups'}
DROP = {'upcycle.type': 'Drop'}
TOKENS = jnp.array(np.random.default_rng(0).integers(0, VOCAB, (3, 8)))
BATCH = {'inputs': TOKENS}


def shards(num_shards, num_experts, top_k):
  """Changes for virtual groups of `num_shards` experts."""
  return {
    **GROUPS,
    'moe.d_ff': WIDTH // num_shards,
    'moe.num_experts': num_experts,
    'moe.top_k': top_k,
  }


def small(*changes):
  """The small config after `changes`."""
  values = {**SMALL}
  for change in changes:
    values |= change
  overrides = [(key, str(value)) for key, value in values.items()]
  return config_lib.apply(base.get_config(), overrides)


@pytest.fixture(scope='module')
def dense():
  """dense(changes) -> (config, params, logits) of a dense model."""
  made = {}

  def get(changes):
    if (name := str(changes)) not in made:
      config = small(changes, DENSE)
      task = build_task(config, VOCAB)
      params, state = task.init(jax.random.key(0), BATCH)
      # Biases start at zero, which would hide their factor.
      noise = np.random.default_rng(1)
      params = jax.tree.map(
        lambda x: x + noise.normal(0, 0.1, x.shape).astype(x.dtype), params
      )
      logits, _ = routed.QUICKLY(task.logits)((params, state), TOKENS)
      made[name] = config, params, np.asarray(logits)
    return made[name]

  return get


def upcycled(dense, model, *changes):
  """Returns the config, the task and the weights of an upcycled model."""
  source, params, _ = dense(model)
  config = small(model, *changes)
  router = build_router(config, VOCAB)
  assert upcycling.problems(source, config, router) == []
  arrays = arrays_lib.flatten_by_name({'state': {'params': params}})
  task = build_task(config, VOCAB)
  flat_task = build_task(upcycling.unrolled(config), VOCAB)
  new = upcycling.upcycle(arrays, 'params', config, flat_task.init, VOCAB)
  shapes, state = jax.eval_shape(task.init, jax.random.key(0), BATCH)
  trained = tuple(
    arrays_lib.subtree(new, f'state.{name}', like)
    for name, like in (('params', shapes), ('model_state', state))
  )
  return config, task, jax.tree.map(jnp.asarray, trained)


def experts_of(trained, layer=0):
  return jax.tree.map(np.asarray, trained[0][f'block_{layer}']['moe'])


SIGMOID = {
  'moe.router.type': 'Sigmoid',
  'moe.router.route_scale': 2.5,
  'moe.router.num_groups': 2,
  'moe.router.groups_kept': 1,
}


CASES = [
  ({}, {**COPIES, 'moe.num_experts': 5, 'moe.top_k': 3}),
  (SWIGLU, shards(3, 12, 6)),
  ({}, {**DROP, 'upcycle.ratio': 0.0}),
]
MORE_CASES = [
  (SWIGLU, {**COPIES, 'moe.top_k': 4, 'moe.dispatch': 'dropless'}),
  ({}, {**COPIES, **SIGMOID}),
  ({}, {**COPIES, **SOFTMAX, 'moe.router.route_scale': 0.5}),
  ({}, {**COPIES, 'moe.router.type': 'Hash', 'moe.every': 2}),
  ({}, shards(2, 4, 2)),
  (SWIGLU, shards(8, 16, 8)),
  ({}, shards(4, 8, 8)),
  ({}, {**shards(2, 12, 4), **SIGMOID}),
  (SWIGLU, {**shards(2, 8, 4), **SOFTMAX, 'moe.router.route_scale': 3.0}),
  # The kernel starts at zero: all experts are tied.
  ({}, {**shards(4, 12, 8), 'moe.router.type': 'NoisyTopK'}),
]


@pytest.mark.parametrize(
  ('model', 'changes'),
  [*CASES, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE_CASES)],
  ids=lambda x: ' '.join(str(v) for v in x.values()) or 'gelu',
)
def test_the_first_logits_are_those_of_the_dense_model(dense, model, changes):
  _, task, trained = upcycled(dense, model, changes)
  logits, _ = routed.QUICKLY(task.logits)(trained, TOKENS)
  np.testing.assert_allclose(logits, dense(model)[2], atol=1e-5)
  parameters.kinds(trained[0])


@pytest.mark.parametrize(
  'changes', mostly_slow([COPIES, shards(2, 8, 4)], COPIES)
)
def test_layers_of_both_models_may_be_stacked(dense, changes):
  scan = {'model.scan_layers': True}
  _, task, trained = upcycled(dense, scan, changes)
  assert 'blocks' in trained[0]
  logits, _ = routed.QUICKLY(task.logits)(trained, TOKENS)
  np.testing.assert_allclose(logits, dense(scan)[2], atol=1e-5)


def test_a_dense_layer_stays_and_its_width_is_that_of_the_source(dense):
  changes = {**COPIES, 'moe.every': 2}
  _, _, (params, _) = upcycled(dense, {}, changes)
  source = dense({})[1]
  for name in ('block_0', 'token_embedding', 'head'):
    jax.tree.map(
      np.testing.assert_array_equal, params[name], dict(source)[name]
    )
  assert 'feed_forward' not in params['block_1']


@pytest.mark.slow
def test_a_token_chooses_whole_groups(dense):
  config, _, trained = upcycled(dense, {}, shards(4, 12, 8))
  kernel = experts_of(trained)['router']['kernel']
  groups = kernel.reshape(len(kernel), 3, 4)
  np.testing.assert_array_equal(groups, groups[..., :1].repeat(4, -1))
  assert len(np.unique(groups[0])) == 3
  x = jax.random.normal(jax.random.key(0), (4, 500, 16))
  tokens = jnp.zeros(x.shape[:2], int)
  inputs = RouterInputs(tokens, tokens == 0, None)
  router = build_router(config, VOCAB)
  for weights in (jnp.array(kernel), jnp.zeros(kernel.shape)):
    routing: Any = router.apply(
      {'params': {'kernel': weights}}, x, inputs, train=False
    )
    expert = np.sort(np.asarray(routing.expert), axis=-1).reshape(-1, 2, 4)
    np.testing.assert_array_equal(expert % 4, expert * 0 + np.arange(4))
    assert (expert // 4 == expert[..., :1] // 4).all()


def test_the_router_is_that_of_a_new_run(dense):
  _, task, trained = upcycled(dense, {}, COPIES)
  key, _ = jax.random.split(jax.random.key(0))
  new, _ = task.init(key, BATCH)
  np.testing.assert_array_equal(
    experts_of(trained)['router']['kernel'],
    new['block_0']['moe']['router']['kernel'],
  )


def test_redrawing_nothing_is_copying(dense):
  _, _, copied = upcycled(dense, {}, COPIES)
  nothing = {**DROP, 'upcycle.ratio': 0.0}
  _, _, dropped = upcycled(dense, {}, nothing)
  jax.tree.map(np.testing.assert_array_equal, copied, dropped)


@pytest.mark.parametrize(
  ('model', 'ratio'), [({}, 0.5), (SWIGLU, 0.25), ({}, 1.0)]
)
def test_an_expert_redraws_one_set_of_units(dense, model, ratio):
  changes = {**DROP, 'upcycle.ratio': ratio}
  _, _, copied = upcycled(dense, model, COPIES)
  _, _, dropped = upcycled(dense, model, changes)
  sets = []
  for layer in range(2):
    old, new = experts_of(copied, layer), experts_of(dropped, layer)
    for i in range(4):
      changed = {
        name: np.moveaxis(old[name][i] != new[name][i], axis, 0)
        for name, axis in upcycled_experts.HIDDEN_AXES.items()
        if name in old
      }
      units = changed['w_out'].any(axis=1)
      for is_new in changed.values():
        same = is_new.reshape(WIDTH, -1)
        np.testing.assert_array_equal(same.all(axis=1), units)
        np.testing.assert_array_equal(same.any(axis=1), units)
      assert units.sum() == ratio * WIDTH
      sets.append(tuple(np.flatnonzero(units)))
    if 'b_out' in old:
      np.testing.assert_array_equal(old['b_out'], new['b_out'])
    for one, other in itertools.combinations(new['w_in'], 2):
      assert (one != other).any()
  assert ratio == 1 or len(set(sets)) == len(sets)


def test_redrawn_units_have_the_mean_and_the_spread_of_the_old_ones():
  rng = np.random.default_rng(0)
  mean, spread = 0.7, 0.2
  # Units of another scale, which the statistics must not mix in, are rare.
  w = rng.normal(mean, spread, (200, 300)).astype(np.float32)
  weights = {'w_in': w, 'w_out': 3 * w.T, 'b_in': w[0]}
  new = upcycled_experts.Drop(0.4).experts(
    weights, 2, 300, np.random.default_rng(1)
  )
  for i in range(2):
    units = (new['w_in'][i] != w).any(axis=0)
    assert units.sum() == 120
    for got, old in (
      (new['w_in'][i][:, units], w[:, units]),
      (new['w_out'][i][units], weights['w_out'][units]),
    ):
      assert got.mean() == pytest.approx(old.mean(), rel=0.01)
      assert got.std() == pytest.approx(old.std(), rel=0.02)
      assert abs(np.corrcoef(got.ravel(), old.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize(
  'variant', mostly_slow(routed.VARIANTS, 'TopK', 'Mixtral')
)
def test_normalized_says_whether_weights_sum_to_the_scale(variant):
  router = routed.make(variant, route_scale=2.5)
  key = jax.random.key(0)
  x = jax.random.normal(key, (2, 6, 8))
  tokens = jnp.arange(12).reshape(2, 6) % routed.VOCAB
  inputs = RouterInputs(tokens, tokens >= 0, None)
  routing, _ = router.init_with_output(key, x, inputs, train=False)
  sums = np.zeros(12)
  token = np.arange(12) if routing.token is None else routing.token
  np.add.at(sums, np.asarray(token), np.asarray(routing.weight).sum(axis=-1))
  assert np.allclose(sums, 2.5, atol=1e-5) == router.normalized


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({**COPIES, 'moe.d_ff': 12}, ('moe.d_ff=12', 'must be 24')),
    ({**DROP, 'moe.d_ff': 12}, ('moe.d_ff=12', 'must be 24')),
    ({**shards(2, 8, 4), 'moe.d_ff': 7}, ('moe.d_ff=7', 'divide 24')),
    ({**shards(2, 8, 4), 'moe.d_ff': 48}, ('moe.d_ff=48', 'divide 24')),
    (shards(2, 7, 4), ('moe.num_experts=7', 'multiple of 2')),
    (shards(2, 8, 3), ('moe.top_k=3', 'multiple of 2')),
    (
      {**shards(2, 8, 4), 'moe.router.type': 'Hash'},
      ("moe.router.type='Hash'", 'TopK'),
    ),
    (
      {**shards(4, 8, 4), **SIGMOID, 'moe.router.num_groups': 8}
      | {'moe.router.groups_kept': 4},
      ('moe.router.num_groups=8', 'divide 2'),
    ),
    (
      {**COPIES, 'moe.router.type': 'Softmax'},
      ("moe.router.type='Softmax'", 'renormalize=true'),
    ),
    (
      {**COPIES, 'moe.router.type': 'ExpertChoice'},
      ("moe.router.type='ExpertChoice'", 'TopK'),
    ),
    ({**COPIES, 'moe.num_shared': 1}, ('moe.num_shared=1', 'must be 0')),
    (
      {**COPIES, 'moe.first_dense_layers': 2},
      ('moe.first_dense_layers=2', 'less than model.num_layers=2'),
    ),
    (
      {**COPIES, 'moe.activation': 'relu2'},
      ("moe.activation='relu2'", "must be 'gelu'"),
    ),
    (
      {**COPIES, 'moe.every': 2, 'moe.dense_d_ff': 25},
      ('moe.dense_d_ff=25', 'must be 24'),
    ),
    (
      {**COPIES, 'model.num_layers': 3},
      ('model.num_layers=3', 'must be 2'),
    ),
  ],
)
def test_what_does_not_fit_is_one_line(changes, words):
  config = small(changes)
  router = build_router(config, VOCAB)
  (line,) = upcycling.problems(small(DENSE), config, router)
  for word in (*words, f"upcycle.type='{config.upcycle.type}'"):
    assert word in line


def test_a_source_with_experts_is_refused():
  with pytest.raises(UserError, match=r'^init_from=/dense: layer 0'):
    upcycling.check(small(), small(COPIES), VOCAB)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'upcycle.type': 'Copy'}, ("upcycle.type='Copy'", 'Copies')),
    (
      {'upcycle.type': 'fractions.Fraction'},
      ("'fractions.Fraction'", 'Copies'),
    ),
    ({**DROP, 'upcycle.ratio': 1.5}, ('ratio=1.5', '<= 1')),
    ({**COPIES, 'upcycle.ratio': 0.5}, ('upcycle.ratio', 'Copies')),
  ],
)
def test_a_mistake_in_the_section_is_one_line(changes, words):
  with pytest.raises(UserError) as error:
    upcycling.build(small(changes))
  (line,) = error.value.problems
  for word in words:
    assert word in line


@pytest.mark.parametrize(
  ('changes', 'word'),
  [
    ({**COPIES, 'init_from': ''}, "upcycle.type='Copies'"),
    ({'upcycle.ratio': 0.5}, 'upcycle.ratio=0.5'),
  ],
)
def test_upcycling_needs_a_source_and_a_type(changes, word):
  with pytest.raises(UserError) as error:
    small(changes)
  (line,) = error.value.problems
  assert word in line


def test_without_a_source_the_command_ends_with_2(command, run, tmp_path):
  words = command(
    '--config.upcycle.type=Copies', f'--workdir={tmp_path / "run"}'
  )
  process = run(words)
  assert process.returncode == 2, process.stderr
  (line,) = process.stderr.splitlines()
  assert "upcycle.type='Copies'" in line
  assert 'init_from' in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_run_starts_from_a_dense_run(tiny, tmp_path):
  shared = {'moe.dense_d_ff': 32, 'sample.num_tokens': 0, 'eval_iters': 0}
  changes = {**shared, 'moe.first_dense_layers': 2, 'num_train_steps': 4}
  source = experiment.build(tiny(changes), tmp_path / 'dense')
  assert source.fit() == 'done'
  assert source.best
  exact = source.best.value
  still = {
    **shared,
    'init_from': tmp_path / 'dense',
    'num_train_steps': 1,
    'optimizer.learning_rate': 0.0,
    'optimizer.weight_decay': 0.0,
  }
  wrong = tiny({**still, **COPIES, 'moe.d_ff': 16})
  with pytest.raises(UserError, match=r'moe\.d_ff=16'):
    experiment.build(wrong, tmp_path / 'wrong')
  assert not (tmp_path / 'wrong' / 'config.json').exists()
  for changes in (COPIES, {**GROUPS, 'moe.d_ff': 16, 'moe.num_experts': 4}):
    config = tiny({**still, **changes})
    workdir = tmp_path / config.upcycle.type
    trainer = experiment.build(config, workdir)
    assert trainer.fit() == 'done'
    assert trainer.score
    assert trainer.score.value == pytest.approx(exact, rel=1e-5)
  arrays, _ = reader.read(workdir / 'checkpoints', 'latest')
  assert 'state.params.block_0.moe.router.kernel' in arrays
  config.num_train_steps = 2
  resumed = experiment.build(config, workdir)
  assert resumed.fit() == 'done'
  assert dict(schema.flatten(config.to_dict()))['upcycle.type']
