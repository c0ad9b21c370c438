"""Metrics that can be merged: over steps, micro-batches and devices."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
  """A weighted mean, kept as its two sums: a mean of means never happens."""

  total: jax.Array
  count: jax.Array

  def merge(self, other: 'Mean') -> 'Mean':
    return Mean(self.total + other.total, self.count + other.count)

  def compute(self) -> np.ndarray:
    """total / count on the host; NaN where nothing was counted."""
    total, count = np.asarray(self.total), np.asarray(self.count)
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.true_divide(total, count)


class Sum(NamedTuple):
  """A sum; below are functions of one, which is never a sum of functions."""

  total: jax.Array

  def merge(self, other: Self) -> Self:
    return type(self)(self.total + other.total)

  def compute(self) -> np.ndarray:
    return np.asarray(self.total)


class MaxOverMean(Sum):
  """The largest of summed amounts over their mean, along the last axis.

  1 if all are equal; NaN where there is nothing.
  """

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total)
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.true_divide(total.max(axis=-1), total.mean(axis=-1))


class Entropy(Sum):
  """Of summed amounts over their sum, along the last axis, in nats.

  0 if one has everything, ln n if n are equal; NaN where there is nothing.
  """

  def compute(self) -> np.ndarray:
    return _entropy(_shares(self.total, axis=-1), axis=-1)


class ShareOfZeros(Sum):
  """The share of summed amounts that are 0, along the last axis.

  NaN where there is nothing at all.
  """

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total)
    share = np.mean(total == 0, axis=-1)
    return np.where(total.any(axis=-1), share, np.nan)


class MutualInformation(Sum):
  """Of pairs, counted in [..., x, y]: I(x; y) / H(y), which normalizes it.

  The share of what y tells that x told already: 0 if they are independent, 1
  if x determines y; NaN where y is always the same, or nothing was counted.
  """

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total, np.float64)
    # Of sums of counts: exactly 0 where all is in one.
    of_x = _entropy(_shares(total.sum(axis=-1), axis=-1), axis=-1)
    of_y = _entropy(_shares(total.sum(axis=-2), axis=-1), axis=-1)
    both = _entropy(_shares(total, axis=(-2, -1)), axis=(-2, -1))
    told = of_x + of_y - both
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.where(of_y > 0, np.clip(told / of_y, 0, 1), np.nan)


def _shares(total: Any, axis: int | tuple[int, ...]) -> np.ndarray:
  total = np.asarray(total, np.float64)
  with np.errstate(divide='ignore', invalid='ignore'):
    return total / total.sum(axis=axis, keepdims=True)


def _entropy(p: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
  logs = np.log(p, where=p > 0, out=np.zeros_like(p))
  return np.sum(-p * logs, axis=axis)


class Last(NamedTuple):
  """The most recent value: a learning rate, for example."""

  value: jax.Array | np.generic

  def merge(self, other: 'Last') -> 'Last':
    return other

  def compute(self) -> np.ndarray:
    return np.asarray(self.value)


class Score(NamedTuple):
  """The monitored metric of one evaluation; lower is better."""

  step: int
  value: float


Metric = Mean | Sum | Last
Metrics = dict[str, Metric]


def zeros_like(metrics: Metrics) -> Metrics:
  """The neutral element of `merge`, from metrics or their shapes."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def merge(old: Metrics, new: Metrics) -> Metrics:
  return {name: old[name].merge(new[name]) for name in new}  # pyright: ignore


def compute(metrics: Metrics) -> dict[str, float | list]:
  """Python numbers (lists, for arrays). Blocks until they are known."""
  metrics = jax.device_get(metrics)
  return {name: metric.compute().tolist() for name, metric in metrics.items()}


def is_for_files(value: Any) -> bool:
  """Not what has three axes or more: a callback makes a picture of that."""
  return np.ndim(value) < 3


def prefixed(split: str, metrics: dict[str, Any]) -> dict[str, Any]:
  """{'<split>/<name>': value}."""
  return {f'{split}/{name}': value for name, value in metrics.items()}
