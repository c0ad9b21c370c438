"""Statistics over seeds: spread, and differences of pairs."""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
ASSUMPTION = (
  "Intervals are Student's t, 95 %. They assume that the differences of the "
  'seeds are independent and normally distributed.'
)


class Spread(NamedTuple):
  """Mean and spread of the seeds of a group.

  Attributes:
    mean: Arithmetic mean.
    std: Sample standard deviation; NaN for one seed.
    num_seeds: Number of seeds.
  """

  mean: float
  std: float
  num_seeds: int


class Difference(NamedTuple):
  """Difference of two groups, over the seeds that both have.

  Attributes:
    mean: Mean of the differences; NaN without a common seed.
    low: Lower end of the confidence interval; NaN with fewer than two pairs.
    high: Upper end of the interval.
    num_pairs: Number of common seeds.
  """

  mean: float
  low: float
  high: float
  num_pairs: int


def spread(values: Sequence[float]) -> Spread:
  """Returns the mean and the spread of the values of the seeds."""
  std = np.std(values, ddof=1) if len(values) > 1 else math.nan
  return Spread(float(np.mean(values)), float(std), len(values))


def difference(
  reference: Mapping[int, float], other: Mapping[int, float]
) -> Difference:
  """Returns `other` minus `reference`, paired by seed.

  Args:
    reference: Loss by seed.
    other: Loss by seed.
  """
  # The stats of SciPy take seconds to import.
  from scipy.special import stdtrit  # noqa: PLC0415

  seeds = sorted(reference.keys() & other.keys())
  found = np.array([other[seed] - reference[seed] for seed in seeds])
  if not seeds:
    return Difference(math.nan, math.nan, math.nan, 0)
  mean = float(found.mean())
  if len(seeds) == 1:
    return Difference(mean, math.nan, math.nan, 1)
  quantile = float(stdtrit(len(seeds) - 1, (1 + CONFIDENCE) / 2))
  half = quantile * float(found.std(ddof=1)) / math.sqrt(len(seeds))
  return Difference(mean, mean - half, mean + half, len(seeds))
