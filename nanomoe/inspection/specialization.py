"""Specialization of experts: lifts of labels, their null and their interval."""

from typing import NamedTuple

from jaxtyping import Float, Int, Real
import numpy as np

from nanomoe.inspection.labels import Labels
from nanomoe.inspection.trace import Trace

NUM_PERMUTATIONS = 200
NUM_RESAMPLES = 200
# Ends of the 95 % intervals.
_ENDS = 0.025, 0.975
# Groups of windows that the bootstrap draws; more would take memory alone.
_MAX_GROUPS = 128
MIN_GROUPS = 8


class Specialization(NamedTuple):
  """Lifts of labels, `[layers, experts, labels]` each.

  Attributes:
    counts: Number of the label's choices of the expert.
    lift: `P(expert | label) / P(expert)`; NaN for a label or an expert that
      does not occur.
    low, high: Ends of the 95 % bootstrap interval of the lift.
    null_low, null_high: Ends of the 95 % interval of the lift if labels are
      permuted.
    information: Mutual information of expert and label in bits, by layer.
    null_information: Its mean if labels are permuted, by layer.
    p_value: Share of permutations with at least the observed information, the
      observed one included, by layer.
  """

  counts: Int[np.ndarray, 'layers experts labels']
  lift: Float[np.ndarray, 'layers experts labels']
  low: Float[np.ndarray, 'layers experts labels']
  high: Float[np.ndarray, 'layers experts labels']
  null_low: Float[np.ndarray, 'layers experts labels']
  null_high: Float[np.ndarray, 'layers experts labels']
  information: Float[np.ndarray, ' layers']
  null_information: Float[np.ndarray, ' layers']
  p_value: Float[np.ndarray, ' layers']


def specialization(
  trace: Trace, labels: Labels, seed: int = 0
) -> Specialization:
  """Returns the lifts of labels in each layer.

  All choices of a token with a label count, those that a capacity dropped too.
  The null permutes the labels of units, as Labels defines them. The bootstrap
  draws windows with replacement: the tokens of a window are not independent.
  Fewer than MIN_GROUPS windows have no interval.

  Args:
    trace: Routing of the tokens.
    labels: Labels of the tokens.
    seed: Random seed of permutations and resamples.
  """
  layers = [_of_layer(x, trace, labels, seed) for x in trace.experts]
  return Specialization(*map(np.stack, zip(*layers, strict=True)))


def lift_of(
  counts: Real[np.ndarray, '*batch experts labels'],
) -> Float[np.ndarray, '*batch experts labels']:
  """Returns `P(expert | label) / P(expert)`, NaN where it is undefined."""
  counts = np.asarray(counts, float)
  of_label = counts.sum(axis=-2, keepdims=True)
  of_expert = counts.sum(axis=-1, keepdims=True)
  expected = of_label * of_expert
  total = counts.sum(axis=(-1, -2), keepdims=True)
  return np.divide(
    counts * total,
    expected,
    where=expected > 0,
    out=np.full(counts.shape, np.nan),
  )


def information_of(
  counts: Real[np.ndarray, '*batch experts labels'],
) -> Float[np.ndarray, '*batch']:
  """Returns the mutual information of expert and label, in bits."""
  total = counts.sum(axis=(-1, -2), keepdims=True).clip(1)
  lift = lift_of(counts)
  log_lift = np.log2(lift, where=lift > 0, out=np.zeros(lift.shape))
  return np.asarray((counts / total * log_lift).sum(axis=(-1, -2)))


def _of_layer(
  experts: Int[np.ndarray, 'tokens k'], trace: Trace, labels: Labels, seed: int
) -> tuple[np.ndarray, ...]:
  """Returns the arrays of a `Specialization`, of one layer."""
  is_choice = (experts < trace.num_experts) & (labels.ids[:, None] >= 0)
  token, _ = np.nonzero(is_choice)  # Token of each choice.
  cell = experts[is_choice].astype(np.int64) * len(labels.names)
  shape = trace.num_experts, len(labels.names)
  size = shape[0] * shape[1]

  def count(ids):
    return np.bincount(cell + ids[token], minlength=size).reshape(shape)

  counts = count(labels.ids)
  rng = np.random.default_rng(seed)
  null = np.stack([count(ids) for ids in _permuted(labels, rng)])
  null_information = information_of(null)
  information = information_of(counts)
  extreme = np.count_nonzero(null_information >= information - 1e-12)

  groups = trace.windows * min(_MAX_GROUPS, trace.windows[-1] + 1)
  groups = groups // (trace.windows[-1] + 1)  # Of equal numbers of windows.
  num_groups = int(groups[-1]) + 1
  if num_groups >= MIN_GROUPS:
    of_group = np.bincount(
      groups[token] * size + cell + labels.ids[token],
      minlength=num_groups * size,
    ).reshape(num_groups, size)
    chances = np.full(num_groups, 1 / num_groups)
    drawn = rng.multinomial(num_groups, chances, NUM_RESAMPLES)
    resampled = (drawn @ of_group.astype(float)).reshape(-1, *shape)
  else:  # The windows' variation is unknown.
    resampled = np.zeros((1, *shape))
  return (
    counts,
    lift_of(counts),
    *_ends(lift_of(resampled)),
    *_ends(lift_of(null)),
    information,
    np.asarray(null_information.mean()),
    np.asarray((1 + extreme) / (1 + len(null)), float),
  )


def _permuted(labels: Labels, rng: np.random.Generator):
  """Yields labels of tokens, after permutations as Labels defines them."""
  if labels.rotates:
    _, first, unit, size = np.unique(
      labels.units, return_index=True, return_inverse=True, return_counts=True
    )
    place = np.arange(len(unit)) - first[unit]
    for _ in range(NUM_PERMUTATIONS):
      moved = (place + rng.integers(size)[unit]) % size[unit]
      yield labels.ids[first[unit] + moved]
    return
  has_label = labels.ids >= 0
  _, first, unit = np.unique(
    labels.units[has_label], return_index=True, return_inverse=True
  )
  of_unit = labels.ids[has_label][first]
  ids = labels.ids.copy()
  for _ in range(NUM_PERMUTATIONS):
    ids[has_label] = rng.permutation(of_unit)[unit]
    yield ids


def _ends(
  samples: Float[np.ndarray, 'samples *shape'],
) -> list[Float[np.ndarray, '*shape']]:
  """Returns the ends of the 95 % interval of samples, without NaN.

  The nearest samples outside of the interval are taken.
  """
  ordered = np.sort(samples, axis=0)  # NaN is last.
  last = np.count_nonzero(~np.isnan(samples), axis=0) - 1
  ranks = np.floor(_ENDS[0] * last), np.ceil(_ENDS[1] * last)
  return [
    np.take_along_axis(ordered, r.astype(int).clip(0)[None], axis=0)[0]
    for r in ranks
  ]
