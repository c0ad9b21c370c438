"""Experts that are made of a feed-forward layer, for upcycling."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.moe.routers import NoisyTopK, Sigmoid, Softmax, TopK

Weights = Mapping[str, Any]

# Axis of the hidden units in each array of one feed-forward network.
HIDDEN_AXES = {'w_in': 1, 'w_gate': 1, 'w_out': 0, 'b_in': 0}

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
      if name in HIDDEN_AXES:
        shards = np.stack(np.split(x, num_shards, HIDDEN_AXES[name]))
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
      for name, axis in HIDDEN_AXES.items():
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
