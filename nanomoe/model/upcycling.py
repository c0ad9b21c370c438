"""Upcycling: experts that start from the feed-forward layers of a dense run.

At step 0 the model computes what the dense model computes, except with `Drop`.
This needs a router whose weights have a known sum for each token; see
`nanomoe.moe.routers.Router.normalized`.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
from flax import traverse_util
import jax
import numpy as np

from nanomoe.config import layers
from nanomoe.config.schema import Config, flatten
from nanomoe.model import stack
from nanomoe.model.build import build_router, layers_with_experts
from nanomoe.moe.routers import NoisyTopK, Sigmoid, Softmax, TopK
from trainers import spec
from trainers.checkpoint import arrays as arrays_lib
from trainers.errors import UserError
from trainers.runtime import keys

Weights = Mapping[str, Any]

# Axis of the hidden units in each array of one feed-forward network.
_HIDDEN_AXES = {'w_in': 1, 'w_gate': 1, 'w_out': 0, 'b_in': 0}
_WEIGHTS = {*_HIDDEN_AXES, 'b_out'}

# Routers that rank experts by scores: experts with equal columns are neighbors
# in the ranking.
_RANKING = (TopK, Softmax, Sigmoid, NoisyTopK)


@dataclasses.dataclass(frozen=True)
class Copies:
  """Upcycling whose experts are copies of the dense layer.

  Komatsuzaki et al. 2022 (Sparse Upcycling), sec. 2.
  """

  def problems(
    self, width: int, config: Config, router: nn.Module
  ) -> Iterator[str]:
    """Yields a line for each value that the type does not allow.

    Args:
      width: Number of hidden units of the dense layers.
      config: Config of the model with experts.
      router: Router of the model with experts.
    """
    del router
    if config.moe.d_ff != width:
      yield (
        f'moe.d_ff={config.moe.d_ff}: upcycle.type={config.upcycle.type!r} '
        f'copies dense layers of moe.dense_d_ff={width} units; it must be '
        f'{width}'
      )

  def experts(
    self,
    dense: Weights,
    num_experts: int,
    d_ff: int,
    rng: np.random.Generator,
  ) -> dict[str, np.ndarray]:
    """Returns the weights of the experts of a layer.

    The weighted sum of the chosen experts is the dense output if their weights
    sum to 1.

    Args:
      dense: Weights of the dense layer, without an axis of experts.
      num_experts: Number of experts.
      d_ff: Number of hidden units of an expert.
      rng: Source of random numbers.
    """
    del d_ff, rng
    return {name: _repeated(x, num_experts) for name, x in dense.items()}

  def router(self, fresh: Any, num_shards: int) -> Any:
    """Returns the parameters of a router.

    Args:
      fresh: Parameters from the router's own initialization.
      num_shards: Number of experts that hold the units of one dense layer.
    """
    del num_shards
    return fresh


@dataclasses.dataclass(frozen=True)
class VirtualGroups(Copies):
  """Upcycling whose experts are shards of the dense layer's hidden units.

  He et al. 2024 (Upcycling LLMs into MoE, arXiv 2410.07524). G neighboring
  experts form a virtual group, which holds each of the G shards once. The
  router's columns are equal within a group, so a token chooses whole groups.
  The shares of a group's weight are equal, so `w_out` is multiplied by G.
  """

  def problems(
    self, width: int, config: Config, router: nn.Module
  ) -> Iterator[str]:
    """Yields a line for each value that the type does not allow.

    Args:
      width: Number of hidden units of the dense layers.
      config: Config of the model with experts.
      router: Router of the model with experts.
    """
    moe, kind = config.moe, f'upcycle.type={config.upcycle.type!r}'
    num_shards, rest = divmod(width, moe.d_ff)
    if rest or not num_shards:
      yield (
        f'moe.d_ff={moe.d_ff}: {kind} divides dense layers of '
        f'moe.dense_d_ff={width} units; it must divide {width}'
      )
      return
    for key, value in (('num_experts', moe.num_experts), ('top_k', moe.top_k)):
      if value % num_shards:
        yield (
          f'moe.{key}={value}: {kind} has virtual groups of '
          f'{num_shards} experts, the dense width {width} over '
          f'moe.d_ff={moe.d_ff}; it must be a multiple of {num_shards}'
        )
        return
    if num_shards > 1 and not isinstance(router, _RANKING):
      yield (
        f'moe.router.type={moe.router.type!r}: {kind} needs a router that '
        f'ranks experts by scores; it must be one of {_names(_RANKING)}'
      )
    elif isinstance(router, Sigmoid) and router.groups_kept < router.num_groups:
      num_groups = moe.num_experts // num_shards
      if num_groups % router.num_groups:
        yield (
          f'moe.router.num_groups={router.num_groups}: {kind} has '
          f'{num_groups} virtual groups, which must stay whole; it must '
          f'divide {num_groups}'
        )

  def experts(
    self,
    dense: Weights,
    num_experts: int,
    d_ff: int,
    rng: np.random.Generator,
  ) -> dict[str, np.ndarray]:
    """Returns the weights of the experts of a layer.

    Expert i holds shard `i % G`. Ties between scores select the experts with
    the lowest indices, so that they select whole groups too.

    Args:
      dense: Weights of the dense layer, without an axis of experts.
      num_experts: Number of experts.
      d_ff: Number of hidden units of an expert.
      rng: Source of random numbers.
    """
    del rng
    num_shards = dense['w_out'].shape[0] // d_ff
    found = {}
    for name, x in dense.items():
      if name in _HIDDEN_AXES:
        shards = np.stack(np.split(x, num_shards, _HIDDEN_AXES[name]))
        found[name] = np.concatenate([shards] * (num_experts // num_shards))
      else:
        # The weights of all chosen experts sum to 1: no factor for b_out.
        found[name] = _repeated(x, num_experts)
    # A chosen group of weight w gives each shard w / G.
    found['w_out'] *= num_shards
    return found

  def router(self, fresh: Any, num_shards: int) -> Any:
    """Returns the parameters of a router, with equal columns in each group.

    Args:
      fresh: Parameters from the router's own initialization.
      num_shards: Number of experts that hold the units of one dense layer.
    """
    return {
      name: np.repeat(x[..., ::num_shards], num_shards, axis=-1)
      for name, x in fresh.items()
    }


@dataclasses.dataclass(frozen=True)
class Drop(Copies):
  """Upcycling by copies in which a share of the hidden units is redrawn.

  Nakamura et al. 2025 (Drop-Upcycling, ICLR). Each expert has a random set of
  units of its own, which is the same for all of its matrices and for `b_in`.
  The weights of these units in an array are drawn from a normal distribution
  with their mean and standard deviation.

  Attributes:
    ratio: Share of the hidden units, from 0 to 1; 0 equals `Copies`.
  """

  ratio: float = 0.5

  def __post_init__(self):
    """Raises ValueError if `ratio` is not in [0, 1]."""
    if not 0 <= self.ratio <= 1:
      raise ValueError(f'ratio={self.ratio} must be >= 0 and <= 1')

  def experts(
    self,
    dense: Weights,
    num_experts: int,
    d_ff: int,
    rng: np.random.Generator,
  ) -> dict[str, np.ndarray]:
    """Returns the weights of the experts of a layer.

    Args:
      dense: Weights of the dense layer, without an axis of experts.
      num_experts: Number of experts.
      d_ff: Number of hidden units of an expert.
      rng: Source of random numbers.
    """
    found = super().experts(dense, num_experts, d_ff, rng)
    num_units = round(self.ratio * d_ff)
    for i in range(num_experts if num_units else 0):
      units = rng.choice(d_ff, num_units, replace=False)
      for name, axis in _HIDDEN_AXES.items():
        if name in found:
          index = (i, *[slice(None)] * axis, units)
          old = found[name][index]
          found[name][index] = rng.normal(old.mean(), old.std(), old.shape)
    return found


UPCYCLINGS = {kind.__name__: kind for kind in (Copies, VirtualGroups, Drop)}


def _names(kinds: tuple[type, ...]) -> str:
  return ', '.join(kind.__name__ for kind in kinds)


def _repeated(x: np.ndarray, times: int) -> np.ndarray:
  """Returns copies of an array along a new first axis."""
  return np.repeat(x[None], times, axis=0)


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
