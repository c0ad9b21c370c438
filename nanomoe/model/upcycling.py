"""Upcycling: experts that start from the feed-forward layers of a dense run.

At step 0 the model computes what the dense model computes, except with `Drop`.
This needs a router whose weights have a known sum for each token; see
`nanomoe.moe.routers.Router.normalized`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from nanomoe.config import layers
from nanomoe.config.schema import Config, flatten
from nanomoe.model import stack
from nanomoe.model.build import build_router, layers_with_experts
from nanomoe.model.upcycled_experts import (
  HIDDEN_AXES,
  UPCYCLINGS,
  Copies,
  Weights,
)
from trainers import spec
from trainers.checkpoint import arrays as arrays_lib
from trainers.errors import UserError
from trainers.runtime import keys

# Arrays of the experts of a layer; its others are those of the router.
_WEIGHTS = {*HIDDEN_AXES, 'b_out'}


def build(config: Config) -> Copies:
  """Returns the upcycling of a config whose `upcycle.type` is not empty.

  Args:
    config: Whole config.

  Raises:
    UserError: The section `upcycle` has a mistake.
  """
  kind = spec.build('upcycle', config.upcycle.to_dict(), UPCYCLINGS)
  if not isinstance(kind, Copies):
    raise UserError(
      f'upcycle.type={config.upcycle.type!r}: builds a {type(kind).__name__}; '
      f'it must be one of {", ".join(UPCYCLINGS)}, or a subclass'
    )
  return kind


def check(dense: Config, config: Config, vocab_size: int) -> None:
  """Raises an error if a dense run cannot be upcycled to a config.

  Args:
    dense: Config of the dense run.
    config: Config of the model with experts.
    vocab_size: Number of tokens in the vocabulary.

  Raises:
    UserError: A line for each problem.
  """
  if lines := problems(dense, config, build_router(config, vocab_size)):
    raise UserError(lines)


def problems(dense: Config, config: Config, router: nn.Module) -> list[str]:
  """Returns a line for each reason why a dense run cannot be upcycled.

  Args:
    dense: Config of the dense run.
    config: Config of the model with experts.
    router: Router of that model, as built by `build_router`.
  """
  kind = build(config)
  moe, upcycle = config.moe, f'upcycle.type={config.upcycle.type!r}'
  if found := layers_with_experts(dense):
    return [
      f'init_from={config.init_from}: layer {found[0]} of that run has '
      f'experts; {upcycle} needs a run whose layers are all dense, as those '
      'of configs/dense.py'
    ]
  with_experts = layers_with_experts(config)
  if not with_experts:
    return [
      f'moe.first_dense_layers={moe.first_dense_layers}: no layer has experts; '
      f'with {upcycle} it must be less than '
      f'model.num_layers={config.model.num_layers}'
    ]
  names = ['model.num_layers', 'model.d_model', 'model.bias', 'moe.activation']
  if len(with_experts) < config.model.num_layers:
    names.append('moe.dense_d_ff')
  lines = []
  values, source = (dict(flatten(c.to_dict())) for c in (config, dense))
  for name in names:
    if values[name] != source[name]:
      lines.append(
        f'{name}={values[name]!r}: with {upcycle} it must be '
        f'{source[name]!r}, as in {config.init_from}'
      )
  if moe.num_shared:
    lines.append(
      f'moe.num_shared={moe.num_shared}: {upcycle} gives the dense layer to '
      'routed experts alone; it must be 0'
    )
  if not getattr(router, 'normalized', False):
    lines.append(
      f"moe.router.type={moe.router.type!r}: the weights of a token's experts "
      f'have no known sum, which {upcycle} needs; it must be TopK, NoisyTopK, '
      'Sigmoid, Hash, or Softmax with moe.router.renormalize=true'
    )
  return [*lines, *kind.problems(dense.moe.dense_d_ff, config, router)]


def routers(params: Weights) -> dict[str, Any]:
  """Returns the parameters that a dense model lacks, by block.

  Args:
    params: Parameters of a model with experts, whose blocks are unrolled.
  """
  return {
    name: {k: v for k, v in block['moe'].items() if k not in _WEIGHTS}
    for name, block in params.items()
    if name.startswith('block_') and 'moe' in block
  }


def unrolled(config: Config) -> Config:
  """Returns a copy of a config with unrolled blocks, as `upcycle` needs it."""
  config = config.copy_and_resolve_references()
  config.model.scan_layers = False
  return config


def upcycle(
  arrays: Mapping[str, Any],
  weights: str,
  config: Config,
  init: Callable[..., tuple[Any, Any]],
  vocab_size: int,
) -> dict[str, Any]:
  """Returns the arrays of a new run with experts, by their names.

  Args:
    arrays: Arrays of the dense run, by their names in a checkpoint.
    weights: Weights to start from, 'params' or 'average'.
    config: Config of the new run, for which `problems` is empty.
    init: Function `(key, batch) -> (params, model_state)` of the task of
      `unrolled(config)`.
    vocab_size: Number of tokens in the vocabulary.
  """
  batch = {'inputs': np.zeros((1, config.block_size), np.int32)}
  # A run without init_from has routers of the same key; see `Trainer`.
  key, _ = jax.random.split(keys.make(config.seed))

  @jax.jit  # XLA leaves out the parameters that are not returned.
  def fresh(key):
    params, model_state = init(key, batch)
    return routers(params), model_state

  new, model_state = fresh(key)
  prefix = f'state.{weights}.'
  dense = {
    tuple(name.removeprefix(prefix).split('.')): np.asarray(x)
    for name, x in arrays.items()
    if name.startswith(prefix)
  }
  router = build_router(config, vocab_size)
  scale = getattr(router, 'route_scale', 1.0)
  params = upcycled(traverse_util.unflatten_dict(dense), config, new, scale)
  return arrays_lib.flatten_by_name(
    {'state': {weights: params, 'model_state': model_state}}
  )


def upcycled(
  params: Weights, config: Config, fresh: Weights, scale: float = 1.0
) -> dict[str, Any]:
  """Returns parameters of a model with experts, with the dense run's weights.

  Args:
    params: Parameters of the dense run. Their blocks may be stacked.
    config: Config of the model with experts, for which `problems` is empty.
    fresh: Parameters that the dense model lacks, as of `routers`.
    scale: Sum of the weights of a token's experts, the `route_scale` of the
      router.

  Returns:
    The parameters. Their blocks are stacked if `model.scan_layers`.
  """
  kind, moe = build(config), config.moe
  params = stack.unstack(params) if stack.STACKED in params else {**params}
  for layer in layers_with_experts(config):
    name = stack.block_name(layer)
    block = dict(params[name])
    dense = {k: np.asarray(x)[0] for k, x in block.pop('feed_forward').items()}
    rng = np.random.default_rng([config.seed, layer])
    experts = kind.experts(dense, moe.num_experts, moe.d_ff, rng)
    for k in experts.keys() & {'w_out', 'b_out'}:
      experts[k] /= scale
    num_shards = len(dense['w_out']) // moe.d_ff
    new = {
      k: kind.router(x, num_shards) if k == 'router' else x
      for k, x in fresh[name].items()
    }
    params[name] = {**block, 'moe': {**new, **experts}}
  if config.model.scan_layers:
    params = stack.stack(params, *layers.repetition(*_layers(config)))
  return params


def _layers(config: Config) -> tuple[int, int, int]:
  """Returns the number of layers, and the keys that place the experts."""
  moe = config.moe
  return config.model.num_layers, moe.first_dense_layers, moe.every
