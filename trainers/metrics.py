"""Metrics that can be merged over steps, micro-batches and devices."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np


class Mean(NamedTuple):
  """Weighted mean, stored as two sums, so that means are never averaged.

  Attributes:
    total: Weighted sum.
    count: Sum of the weights.
  """

  total: jax.Array
  count: jax.Array

  def merge(self, other: 'Mean') -> 'Mean':
    """Returns the mean of both samples."""
    return Mean(self.total + other.total, self.count + other.count)

  def compute(self) -> np.ndarray:
    """Returns total / count on the host, NaN where the count is 0."""
    total, count = np.asarray(self.total), np.asarray(self.count)
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.true_divide(total, count)


class Sum(NamedTuple):
  """Sum. Its subclasses are functions of a sum, not sums of a function.

  Attributes:
    total: The sum.
  """

  total: jax.Array

  def merge(self, other: Self) -> Self:
    """Returns the metric of both sums."""
    return type(self)(self.total + other.total)

  def compute(self) -> np.ndarray:
    """Returns the value on the host."""
    return np.asarray(self.total)


class MaxOverMean(Sum):
  """Largest sum divided by the mean of the sums, along the last axis.

  The value is 1 if all sums are equal, NaN if all are 0.
  """

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total)
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.true_divide(total.max(axis=-1), total.mean(axis=-1))


class Entropy(Sum):
  """Entropy of the normalized sums, along the last axis, in nats.

  The value is 0 if one sum is positive, ln n if n are equal, NaN if all are 0.
  """

  def compute(self) -> np.ndarray:
    return _entropy(_shares(self.total, axis=-1), axis=-1)


class ShareOfZeros(Sum):
  """Share of sums that are 0, along the last axis.

  The value is NaN if all sums are 0.
  """

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total)
    share = np.mean(total == 0, axis=-1)
    return np.where(total.any(axis=-1), share, np.nan)


class MutualInformation(Sum):
  """Normalized mutual information I(x; y) / H(y) of counts `[..., x, y]`.

  The value is the share of the information in y that x gives. It is 0 if x and
  y are independent, 1 if x determines y. It is NaN if y is constant or nothing
  was counted.
  """

  def compute(self) -> np.ndarray:
    total = np.asarray(self.total, np.float64)
    # Counts are summed before division: an entropy is then exactly 0 if one
    # value has all counts.
    h_x = _entropy(_shares(total.sum(axis=-1), axis=-1), axis=-1)
    h_y = _entropy(_shares(total.sum(axis=-2), axis=-1), axis=-1)
    h_xy = _entropy(_shares(total, axis=(-2, -1)), axis=(-2, -1))
    information = h_x + h_y - h_xy
    with np.errstate(divide='ignore', invalid='ignore'):
      return np.where(h_y > 0, np.clip(information / h_y, 0, 1), np.nan)


def _shares(total: Any, axis: int | tuple[int, ...]) -> np.ndarray:
  total = np.asarray(total, np.float64)
  with np.errstate(divide='ignore', invalid='ignore'):
    return total / total.sum(axis=axis, keepdims=True)


def _entropy(p: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
  logs = np.log(p, where=p > 0, out=np.zeros_like(p))
  return np.sum(-p * logs, axis=axis)


class Last(NamedTuple):
  """Most recent value, for example a learning rate."""

  value: jax.Array | np.generic

  def merge(self, other: 'Last') -> 'Last':
    """Returns `other`, the later one."""
    return other

  def compute(self) -> np.ndarray:
    """Returns the value on the host."""
    return np.asarray(self.value)


class Score(NamedTuple):
  """Monitored metric of one evaluation; lower is better.

  Attributes:
    step: Step of the evaluation.
    value: Value of the metric.
  """

  step: int
  value: float


Metric = Mean | Sum | Last
Metrics = dict[str, Metric]


def zeros_like(metrics: Metrics) -> Metrics:
  """Returns zero metrics, the neutral element of `merge`.

  Args:
    metrics: Metrics or their shapes.
  """
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def merge(old: Metrics, new: Metrics) -> Metrics:
  """Returns `old` merged with `new`, metric by metric."""
  return {name: old[name].merge(new[name]) for name in new}  # pyright: ignore


def compute(metrics: Metrics) -> dict[str, float | list]:
  """Returns metrics as Python numbers, or lists of numbers for arrays.

  The call waits until the device has computed the metrics.

  Args:
    metrics: Metrics by name.
  """
  metrics = jax.device_get(metrics)
  return {name: metric.compute().tolist() for name, metric in metrics.items()}


def is_for_files(value: Any) -> bool:
  """Returns whether a metric is written to files: it has at most two axes.

  Callbacks draw arrays of more axes.
  """
  return np.ndim(value) < 3


def prefixed(split: str, metrics: dict[str, Any]) -> dict[str, Any]:
  """Returns {'<split>/<name>': value}."""
  return {f'{split}/{name}': value for name, value in metrics.items()}
