"""What a step must not do, seen in its program and not by a clock."""

import collections
import itertools
import logging

import jax
from jax.extend import core
import jax.numpy as jnp
import pytest

from configs import base
from nanomoe import experiment, optimizers
from trainers import step as step_lib
from trainers.callbacks import Callback
from trainers.state import TrainState


def _equations(jaxpr):
  """Of the program and of all that it calls."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
    ):
      if isinstance(value, core.ClosedJaxpr):
        yield from _equations(value.jaxpr)
      elif isinstance(value, core.Jaxpr):
        yield from _equations(value)


@pytest.fixture(scope='module', params=['dropless', 'capacity', 'grouped'])
def program(request):
  """The equations of a training step of base.py, by primitive."""
  config = experiment.resolve_auto(base.get_config())
  config.moe.dispatch = request.param
  task = experiment.build_task(config, 65)
  optimizer, schedule = optimizers.build(config.optimizer, 10)
  shape = (config.batch_size, config.block_size)
  batch = {
    'inputs': jnp.zeros(shape, jnp.int32),
    'targets': jnp.zeros(shape, jnp.int32),
    'weights': jnp.ones(shape),
  }
  state = jax.eval_shape(
    lambda key: TrainState.create(*task.init(key, batch), optimizer),
    jax.random.key(0),
  )
  step = step_lib.make_train_step(task, optimizer, schedule)
  traced = jax.make_jaxpr(step)(state, batch, jax.random.key(0))
  found = collections.defaultdict(list)
  for equation in _equations(traced.jaxpr):
    found[equation.primitive.name].append(equation)
  return found


def test_nothing_is_sorted(program):
  assert 'sort' not in program
  assert program['dot_general']  # It is the program.


def test_only_parameters_gather_what_is_scattered(program, request):
  """Rows of tokens are not scattered, because XLA adds them one by one.

  The exceptions are an iteration's 256 rows in the overflow loop of `dropless`
  and the integers that count assignments.
  """
  assert program['scatter-add']
  has_trips = request.node.callspec.params['program'] == 'dropless'
  embedding, experts = (65, 128), {(4, 128, 512), (4, 512), (4, 512, 128)}
  for equation in program['scatter-add']:
    operand, index, _ = (v.aval for v in equation.invars)
    if operand.dtype == jnp.int32:
      continue
    if equation.outvars[0].aval.shape not in {embedding, (4, 128), *experts}:
      assert has_trips
      assert index.shape[:-1] == (1, 256)


def test_random_bits_are_few(program):
  """Dropout hashes; only keys are drawn, a few words each."""

  def drawn(equations):
    found = [e for e in equations if e.primitive.name == 'random_bits']
    return sum(e.outvars[0].aval.size for e in found)

  assert drawn(itertools.chain(*program.values())) < 1000
  bits = jax.make_jaxpr(lambda key: jax.random.bits(key, (5000,)))
  assert drawn(_equations(bits(jax.random.key(0)).jaxpr)) == 5000


class _NoTransfers(Callback):
  """Forbids what is sent to the device without being asked for.

  In steps without an evaluation: it makes its first zeros on the host.
  """

  def __init__(self, eval_interval: int):
    self.eval_interval = eval_interval

  def on_train_step_end(self, loop):
    steady = (loop.step + 1) % self.eval_interval != 0
    jax.config.update(
      'jax_transfer_guard_host_to_device', 'disallow' if steady else 'allow'
    )

  def on_fit_end(self, loop):
    jax.config.update('jax_transfer_guard_host_to_device', 'allow')


class _Compiled(logging.Handler):
  """Counts compilations by the name of the program."""

  def __init__(self):
    super().__init__()
    self.counts = collections.Counter()

  def emit(self, record):
    words = record.getMessage().split()
    if words[0] == 'Compiling':
      self.counts[words[1]] += 1


def test_a_run_compiles_each_program_once_and_sends_batches_only(
  tiny, tmp_path
):
  """Three evaluations; none but its first step compiles."""
  config = tiny({'sample.num_tokens': 0, 'model.num_layers': 1})
  trainer = experiment.build(config, tmp_path)
  trainer.callbacks.append(_NoTransfers(config.eval_interval))
  logger, compiled = (
    logging.getLogger('jax._src.interpreters.pxla'),
    _Compiled(),
  )
  logger.addHandler(compiled)
  try:
    with jax.log_compiles():
      assert trainer.fit() == 'done'
  finally:
    logger.removeHandler(compiled)
  for name in ('jit(_accumulate)', 'jit(add)', 'jit(make)'):
    assert compiled.counts[name] == 1, compiled.counts
