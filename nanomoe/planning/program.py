"""Training step of a config as shapes: its state, its work, its program.

Nothing is computed and no parameter is allocated.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from nanomoe import optimizers
from nanomoe.config import schema
from nanomoe.config.schema import Config
from nanomoe.model import parameters
from nanomoe.planning import products
from nanomoe.task import build_task
from trainers import step as step_lib
from trainers import step_runner
from trainers.checkpoint import arrays as arrays_lib
from trainers.mesh import Placement, num_batch_parts
from trainers.runtime import keys
from trainers.state import TrainState

# Fields of TrainState by term of the plan; other fields belong to model_state.
_TERMS = {
  'params': 'weights',
  'opt_state': 'optimizer',
  'average': 'average',
}


class Program(NamedTuple):
  """Training step of a config, with its arguments as shapes.

  Attributes:
    step: Jitted `trainers.step.StepFn`.
    placement: Shardings on the mesh.
    state: State of training, with shardings.
    batch: Global batch, with shardings.
    key: Random key of the run, with its sharding.
  """

  step: Any
  placement: Placement
  state: TrainState
  batch: Any
  key: Any


def make(config: Config, vocab_size: int, mesh: Mesh | AbstractMesh) -> Program:
  """Returns the training step that a run of `config` compiles.

  Args:
    config: Whole config, without 'auto'.
    vocab_size: Number of tokens in the vocabulary.
    mesh: Mesh of the run; an abstract one serves traces and sizes alone.

  Raises:
    UserError: A part of the config cannot be built.
  """
  placement = Placement(mesh, parameters.axes)
  task = build_task(config, vocab_size, mesh=mesh)
  options = config.optimizer
  optimizer, schedule = optimizers.build(options, config.num_train_steps)
  spikes = step_lib.Spikes(options.spike_factor, options.spike_window)
  shape = config.batch_size, config.block_size
  dtypes = {'inputs': jnp.int32, 'targets': jnp.int32, 'weights': jnp.float32}
  batch = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement.batch)
    for name, dtype in dtypes.items()
  }

  init: Any = task.init

  def create(key, batch):
    params, model_state = init(key, batch)
    return TrainState.create(
      params,
      model_state,
      optimizer,
      average=options.ema_decay > 0,
      window=spikes.window,
    )

  key = jax.eval_shape(lambda: keys.make(0))
  shapes: Any = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()
  }
  state = jax.eval_shape(create, key, shapes)
  return Program(
    jax.jit(
      step_lib.make_train_step(
        task,
        optimizer,
        schedule,
        options.ema_decay,
        spikes,
        config.accumulate_steps,
      )
    ),
    placement,
    placement.abstract(state, placement.shardings(state)),
    batch,
    placement.abstract(key),
  )


def lower(program: Program) -> jax.stages.Lowered:
  """Returns the lowered step, the same as that of a run."""
  arguments = program.state, program.batch, program.key
  metrics = jax.eval_shape(program.step, *arguments)[1]
  metrics = program.placement.abstract(metrics)
  return step_runner.lower(
    program.step,
    program.placement,
    program.state,
    metrics,
    program.batch,
    program.key,
  )


def state_bytes(program: Program) -> dict[str, int]:
  """Returns the bytes of the state on each device, by term.

  Args:
    program: Training step on a mesh of any size.

  Returns:
    {'weights', 'optimizer', 'average', 'model_state': bytes}. model_state
    includes the counters and the recent losses.
  """
  found = dict.fromkeys([*_TERMS.values(), 'model_state'], 0)
  for name, leaf in arrays_lib.flatten_by_name(program.state).items():
    term = _TERMS.get(name.split('.')[0], 'model_state')
    shape = leaf.sharding.shard_shape(leaf.shape)
    found[term] += math.prod(shape) * leaf.dtype.itemsize
  return found


def logits_bytes(config: Config, program: Program, vocab_size: int) -> int:
  """Returns the bytes of one float32 copy of the logits on each device.

  Args:
    config: Whole config.
    program: Training step of the config.
    vocab_size: Number of tokens in the vocabulary.
  """
  mesh = program.placement.mesh
  rows = config.batch_size // num_batch_parts(mesh) // config.accumulate_steps
  time = min(config.model.logits_chunk or config.block_size, config.block_size)
  columns = config.model.vocab_rows or vocab_size
  if not config.model.tie_embeddings and not columns % mesh.shape['tensor']:
    columns //= mesh.shape['tensor']
  return 4 * rows * time * columns


def flops(program: Program) -> int:
  """Returns the floating-point operations of a step's matrix products.

  Forward and backward are counted as traced, on all devices together. Loads of
  experts are balanced.
  """
  arguments = program.state, program.batch, program.key
  return products.count(program.step, *arguments, trips=0)


def active_flops_per_token(
  config: Config, vocab_size: int, mesh: AbstractMesh
) -> float:
  """Returns a token's floating-point operations, on its own experts alone.

  The count is that of the same model with as many experts as a token uses,
  each of which computes every token. The products of the router, 6 FLOPs for
  each element of its matrices, are those of the whole model. Nothing is
  computed twice: there is no remat and no accumulation.

  Args:
    config: Whole config, without 'auto'.
    vocab_size: Number of tokens in the vocabulary.
    mesh: Mesh of one device.
  """
  values = config.to_dict()
  # In bfloat16, dense experts compute their hidden layers again.
  values.update(batch_size=1, accumulate_steps=1, precision='float32')
  values['model'].update(remat='none', logits_chunk=0)
  whole = make(schema.make(values), vocab_size, mesh)
  moe = values['moe']
  # The built-in router whose only demand is top_k <= num_experts.
  moe.update(
    num_experts=moe['top_k'], dispatch='dense', router={'type': 'TopK'}
  )
  program = make(schema.make(values), vocab_size, mesh)
  router = _router_size(whole) - _router_size(program)
  return flops(program) / config.block_size + 6 * router


def _router_size(program: Program) -> int:
  """Returns the number of elements in the matrices of all routers."""
  params = arrays_lib.flatten_by_name(program.state.params)
  return sum(
    leaf.size
    for name, leaf in params.items()
    if '.router.' in name
    and parameters.kind_of(name.replace('.', '/'), leaf.ndim).is_matrix
  )
