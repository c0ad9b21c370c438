"""Meshes: placement, and training steps that equal those of one device."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from benchmarks import parity
from nanomoe import experiment, optimizers
from nanomoe.config import schema, validation
from nanomoe.model import parameters
from nanomoe.moe import experts as experts_lib
from nanomoe.moe.dispatch import exchange, registry
from nanomoe.moe.routing import Routing
from tests.routed import QUICKLY
from tests.shrunk import mostly_slow
from tests.test_architecture import CONFIGS, _shrunk
from trainers.errors import UserError
from trainers.mesh import AXES, Placement, make_mesh, row_constraint
from trainers.state import TrainState

NUM_EXPERTS, TOP_K, D_MODEL, D_FF = 8, 2, 8, 12
EIGHT = {'data': 2, 'fsdp': 2, 'expert': 2}
WITH_TENSOR = {'data': 2, 'expert': 2, 'tensor': 2}


def test_there_are_devices_for_these_tests():
  assert len(jax.devices()) >= 8


def test_one_device_is_a_mesh():
  mesh = make_mesh()
  assert mesh.axis_names == AXES
  assert mesh.devices.ravel().tolist() == jax.devices()[:1]


def test_one_axis_takes_all_devices():
  num = len(jax.devices())
  assert make_mesh({'fsdp': -1}).shape['fsdp'] == num
  mesh = make_mesh({'data': 2, 'tensor': -1})
  assert mesh.shape['tensor'] == num // 2
  assert len(set(mesh.devices.ravel())) == num


@pytest.mark.parametrize(
  ('sizes', 'told'),
  [
    ({'data': -1, 'fsdp': -1}, 'only one axis may be -1'),
    ({'data': -1, 'fsdp': 3}, 'it must divide the number of devices'),
    ({'data': 4, 'tensor': 512}, 'JAX_NUM_CPU_DEVICES=2048'),
  ],
)
def test_a_mesh_that_does_not_fit_is_one_line(sizes, told):
  with pytest.raises(UserError) as error:
    make_mesh(sizes)
  (line,) = error.value.problems
  assert told in line
  assert all(f'mesh.{axis}={size}' in line for axis, size in sizes.items())


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'batch_size': 12}, 'batch_size=12: it must be a multiple of mesh.data'),
    (
      {'accumulate_steps': 4},
      'batch_size=16: it must be a multiple of '
      'mesh.data * mesh.fsdp * mesh.expert * accumulate_steps=32',
    ),
    (
      {'moe.num_experts': 3},
      'moe.num_experts=3: it must be a multiple',
    ),
    ({'model.num_kv_heads': 1}, 'model.num_kv_heads=1: it must be a multiple'),
    ({'moe.d_ff': 33}, 'moe.d_ff=33: it must be a multiple of mesh.tensor=2'),
  ],
)
def test_a_size_that_does_not_divide_is_one_line(changes, told):
  config = parity.make_config(changes)
  sizes = {'data': 2, 'fsdp': 2, 'expert': 2, 'tensor': 2}
  flat = dict(schema.flatten(config.to_dict()))
  (line,) = validation.mesh_problems(flat, sizes)
  assert line.startswith(told)


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'mesh.tensor': 0}, 'mesh.tensor=0: it must be >= 1, or -1'),
    ({'mesh.data': -1, 'mesh.fsdp': -1}, 'only one axis may be -1'),
    (
      {'mesh.expert': 2, 'moe.router.type': 'ExpertChoice'},
      "moe.router.type='ExpertChoice' selects among the tokens of all devices",
    ),
    (
      {'moe.dispatch': 'capacity', 'moe.exchange': 'experts'},
      'would have a capacity on each device, which is another algorithm',
    ),
    ({'moe.exchange': 'tokens'}, 'it needs mesh.expert > 1'),
  ],
)
def test_what_would_be_another_algorithm_is_refused_by_name(changes, told):
  with pytest.raises(UserError) as error:
    parity.make_config(changes)
  (line,) = error.value.problems
  assert told in line


@pytest.mark.parametrize('name', mostly_slow(CONFIGS, 'base', 'gpu_1b'))
def test_every_parameter_of_every_config_has_one_rule(name, corpus):
  config = experiment.resolve_auto(_shrunk(name, corpus))
  task = experiment.build_task(config, parity.VOCAB_SIZE)
  batch = parity.make_batch(config, 0)
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  placement = Placement(make_mesh(WITH_TENSOR), parameters.axes)
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  for path, shape in shapes.items():
    axes = placement.axes(path, shape)
    used = [axis for axis in axes if axis]
    assert len(axes) == len(shape)
    assert len(used) == len(set(used))
  experts = [path for path in shapes if re.search('/moe/w_in$', path)]
  assert all('expert' in placement.axes(p, shapes[p]) for p in experts)


@pytest.mark.parametrize('name', ['AdamW', 'Lion', 'Adafactor', 'Muon'])
def test_the_state_of_an_optimizer_follows_its_parameters(name):
  """Adafactor's factors are divided along the axis that they keep."""
  config = parity.make_config(
    {'optimizer.type': name, 'model.d_model': 128, 'moe.d_ff': 256}
  )
  task = experiment.build_task(config, parity.VOCAB_SIZE)
  batch = parity.make_batch(config, 0)
  optimizer, _ = optimizers.build(config.optimizer, 10)

  def create(key):
    params, model_state = task.init(key, batch)
    return TrainState.create(params, model_state, optimizer, average=True)

  state = jax.eval_shape(create, jax.random.key(0))
  placement = Placement(
    make_mesh({'fsdp': 2, 'expert': 2, 'tensor': 2}), parameters.axes
  )
  shardings = placement.shardings(state)
  found = {}
  for (path, leaf), sharding in zip(
    jax.tree_util.tree_leaves_with_path(state),
    jax.tree.leaves(shardings),
    strict=True,
  ):
    name_of_leaf = jax.tree_util.keystr(path, simple=True, separator='/')
    if name_of_leaf.endswith('block_0/moe/w_in'):
      found.setdefault(leaf.shape, set()).add(sharding.spec)
  assert found.pop((8, 128, 256)) == {PartitionSpec('expert', 'fsdp', 'tensor')}
  if name == 'Adafactor':
    assert found.pop((8, 128)) == {PartitionSpec('expert', 'fsdp')}
    assert found.pop((8, 256)) == {PartitionSpec('expert', 'tensor')}
  assert all(specs == {PartitionSpec(None)} for specs in found.values())


def test_what_is_not_divided_is_told(caplog):
  def axes(path, shape):
    return ('fsdp', None) if path == 'odd' else (None, None)

  params = {
    'odd': jax.ShapeDtypeStruct((65, 4), jnp.float32),
    'big': jax.ShapeDtypeStruct((1024, 1024), jnp.float32),
    'small': jax.ShapeDtypeStruct((4, 4), jnp.float32),
  }
  with caplog.at_level(logging.INFO):
    Placement(make_mesh({'fsdp': 2}), axes).report(params)
  assert caplog.messages == [
    'mesh: fsdp 2',
    'odd [65, 4] is not divided over fsdp: no multiple of 2',
    'big, 4.2 MB, is on every device whole',
  ]


def test_rows_that_do_not_divide_are_left_alone():
  constrain = row_constraint(make_mesh(EIGHT))
  x = jnp.ones((3, 2))
  assert constrain(x) is x
  assert row_constraint(make_mesh())(x) is x
  divided = jax.jit(constrain)(jnp.ones((16, 2)))
  assert divided.sharding.spec == PartitionSpec(('data', 'fsdp', 'expert'))


# Experts of 64 tokens, two each, on 8 devices.


def _loads(rng):
  """Returns experts `[tokens, k]` by what is special about them."""
  order = [rng.permutation(NUM_EXPERTS) for _ in range(64)]
  every = np.array(order)[:, :TOP_K]
  skewed = np.sort(every, axis=1) // 3
  skewed[:, 1] += 3
  one = np.full_like(every, NUM_EXPERTS)
  one[:, 0] = 5
  padded = every.copy()
  padded[17:] = NUM_EXPERTS
  one_device = np.full_like(every, NUM_EXPERTS)
  one_device[:8] = every[:8]
  return {
    'random': every,
    'skewed': skewed,
    'all to one expert': one,
    'padding': padded,
    'all tokens on one device': one_device,
    'nothing': np.full_like(every, NUM_EXPERTS),
  }


def _differentiated(dispatch):
  def loss(x, weight, experts, expert, g):
    load = jnp.zeros(NUM_EXPERTS, jnp.int32)
    probs = jnp.zeros((len(x), NUM_EXPERTS))
    routing = Routing(expert, weight, probs, load, {}, {})
    return jnp.sum(g * dispatch(x, routing, experts, 'float32')[0])

  return QUICKLY(jax.value_and_grad(loss, argnums=(0, 1, 2)))


@functools.cache
def _operands():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  experts = experts_lib.Experts(
    w_in=normal(NUM_EXPERTS, D_MODEL, D_FF),
    w_out=normal(NUM_EXPERTS, D_FF, D_MODEL),
    b_in=normal(NUM_EXPERTS, D_FF),
    b_out=normal(NUM_EXPERTS, D_MODEL),
  )
  x, g = normal(64, D_MODEL), normal(64, D_MODEL)
  return x, jnp.abs(normal(64, TOP_K)), experts, g, _loads(rng)


@functools.cache
def _expected(load):
  x, weight, experts, g, loads = _operands()
  dense = _differentiated(registry.build('dense', {}))
  return jax.device_get(dense(x, weight, experts, jnp.asarray(loads[load]), g))


@pytest.mark.parametrize(
  ('sizes', 'dispatch', 'name'),
  [
    ({'expert': 8}, 'dropless', 'all_to_all'),
    pytest.param(WITH_TENSOR, 'dropless', 'all_to_all', marks=pytest.mark.slow),
    pytest.param(EIGHT, 'dropless', 'all_to_all', marks=pytest.mark.slow),
    pytest.param({'expert': 8}, 'dropless', 'tokens', marks=pytest.mark.slow),
    pytest.param(EIGHT, 'dropless', 'tokens', marks=pytest.mark.slow),
    pytest.param({'expert': 8}, 'dropless', 'experts', marks=pytest.mark.slow),
    pytest.param({'data': 8}, 'dropless', 'experts', marks=pytest.mark.slow),
    pytest.param(EIGHT, 'grouped', 'all_to_all', marks=pytest.mark.slow),
    pytest.param(EIGHT, 'grouped', 'tokens', marks=pytest.mark.slow),
    pytest.param(EIGHT, 'dense', 'all_to_all', marks=pytest.mark.slow),
    pytest.param(EIGHT, 'dense', 'tokens', marks=pytest.mark.slow),
  ],
)
def test_an_exchange_equals_dense_on_one_device(sizes, dispatch, name):
  """The output's sum with random weights, and all gradients, at any loads."""
  mesh = make_mesh(sizes)
  placement = Placement(mesh, parameters.axes)
  x, weight, experts, g, loads = _operands()
  run = _differentiated(registry.build(dispatch, {'exchange': name}, mesh))
  rows = placement.put_batch({'x': x, 'weight': weight, 'g': g})
  axes = {'w_in': 'block_0/moe/w_in', 'w_out': 'block_0/moe/w_out'}
  axes |= {'b_in': 'block_0/moe/b_in', 'b_out': 'block_0/moe/b_out'}
  experts = experts.replace(
    **{
      field: jax.device_put(
        getattr(experts, field),
        jax.NamedSharding(
          mesh,
          PartitionSpec(*placement.axes(path, getattr(experts, field).shape)),
        ),
      )
      for field, path in axes.items()
    }
  )
  for load, expert in loads.items():
    expert = placement.put_batch({'': jnp.asarray(expert)})['']
    found = run(rows['x'], rows['weight'], experts, expert, rows['g'])
    for a, b in zip(
      jax.tree.leaves(jax.device_get(found)),
      jax.tree.leaves(_expected(load)),
      strict=True,
    ):
      atol = 2e-5 * (1e-3 + np.abs(b).max())
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=load)


def test_the_exchange_follows_bytes():
  choose = functools.partial(
    exchange.choose, num_tokens=4096, top_k=2, d_model=64, num_weights=2**20
  )
  sizes = dict.fromkeys(AXES, 1)
  assert choose({**sizes, 'data': 8}) == 'experts'
  assert choose({**sizes, 'expert': 2}, num_weights=2**30) == 'tokens'
  assert choose({**sizes, 'expert': 8}, num_weights=2**30) == 'all_to_all'
  assert choose({**sizes, 'expert': 8}, num_weights=2**12) == 'experts'


def test_bytes_of_all_to_all_do_not_grow_with_the_axis():
  moved = {
    parts: exchange.moved_numbers(
      parts, num_tokens=512, top_k=2, d_model=64, num_weights=2**20
    )
    for parts in (8, 64)
  }
  assert moved[64]['all_to_all'] < 1.2 * moved[8]['all_to_all']
  assert moved[64]['tokens'] == 9 * moved[8]['tokens']


# Whole training steps.

DROPPING = {'model.dropout_rate': 0.1, 'model.num_layers': 1}


@functools.cache
def _reference(**changes):
  return parity.train(parity.make_config(changes), 3)


def _check(sizes, changes):
  """Compares a mesh with one device; returns its outcome."""
  on_mesh = {f'mesh.{axis}': size for axis, size in sizes.items()}
  outcome = parity.train(parity.make_config({**changes, **on_mesh}), 3)
  found = parity.differences(outcome, _reference(**changes))
  assert found['loss'] < 1e-6
  assert found['params'] < 2e-5
  assert found['same_load']
  return outcome


@pytest.mark.slow
def test_a_step_of_data_parallelism_gathers_nothing(capfd):
  """Nothing but gradients and sums is reduced, and no array is copied whole."""
  outcome = _check({'data': 8}, DROPPING)
  assert set(parity.collectives(outcome.program)) == {'all-reduce'}
  assert 'Involuntary' not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
  ('mesh', 'variant'),
  [
    ('fsdp 8', 'dropout'),
    ('fsdp 4 x tensor 2', 'remat'),
    ('data 2 x fsdp 2 x expert 2', 'accumulation'),
    ('data 2 x expert 2 x tensor 2', 'scan'),
  ],
)
def test_every_mesh_equals_one_device(mesh, variant, capfd):
  changes = {'moe.dispatch': 'dropless', **parity.VARIANTS[variant]}
  _check(parity.MESHES[mesh], changes)
  assert 'Involuntary' not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('dispatch', ['dense', 'capacity', 'grouped'])
def test_every_dispatch_equals_one_device(dispatch):
  _check(EIGHT, {'moe.dispatch': dispatch})


@pytest.mark.parametrize('sizes', [{'data': 8}, EIGHT, WITH_TENSOR])
def test_dropout_has_the_same_bits_on_every_mesh(sizes):
  assert parity.has_same_dropout(sizes)


@pytest.mark.slow
def test_a_mesh_of_one_device_changes_no_program():
  """The program has neither shardings nor collectives."""
  program = _reference(**DROPPING).program
  assert 'num_partitions' not in program
  assert not parity.collectives(program)


def test_two_meshes_in_one_process_do_not_share_traces():
  """A mesh that a trace remembers would be that of the first program."""
  for sizes in ({'data': 2}, {'data': 4}, {'data': 2}):
    mesh = make_mesh(sizes)
    constrain = row_constraint(mesh)
    found = jax.jit(constrain)(jnp.ones((16, 2)))
    assert found.sharding.mesh.shape['data'] == sizes['data']
