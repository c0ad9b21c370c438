"""Metrics that can be merged: over steps, micro-batches and devices."""

from typing import Any, NamedTuple

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


class MaxOverMean(NamedTuple):
  """The largest of summed amounts over their mean, along the last axis.

  1 if all are equal; NaN where there is nothing. Sums are merged, not ratios.
  """

  total: jax.Array

  def merge(self, other: 'MaxOverMean') -> 'MaxOverMean':
    return MaxOverMean(self.total + other.total)

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total)
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.true_divide(total.max(axis=-1), total.mean(axis=-1))


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


Metric = Mean | MaxOverMean | Last
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


def prefixed(split: str, metrics: dict[str, Any]) -> dict[str, Any]:
  """{'<split>/<name>': value}."""
  return {f'{split}/{name}': value for name, value in metrics.items()}
