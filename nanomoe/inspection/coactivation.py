"""Co-activation: experts of one token, and first choices of two layers."""

import itertools
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

from nanomoe.inspection.specialization import lift_of
from nanomoe.inspection.trace import Trace


class Pairs(NamedTuple):
  """Pairs of experts, with a matrix for each layer.

  Attributes:
    counts: Number of tokens with both experts.
    lift: Number of tokens with both over the number that is expected; NaN if
      one of the experts does not occur. Expected pairs are proportional to the
      loads of both experts, and as many as the pairs that occur.
  """

  counts: Int[np.ndarray, 'layers experts experts']
  lift: Float[np.ndarray, 'layers experts experts']


def membership(
  experts: Int[np.ndarray, 'tokens k'], num_experts: int
) -> Bool[np.ndarray, 'tokens experts']:
  """Returns whether each token has each expert."""
  found = np.zeros((len(experts), num_experts + 1), bool)
  np.put_along_axis(found, experts, True, axis=1)
  return found[:, :num_experts]


def of_tokens(trace: Trace) -> Pairs:
  """Returns the pairs of different experts of the same token, by layer.

  The diagonal of the lifts is NaN.

  Args:
    trace: Routing of the tokens.
  """
  counts, lifts = [], []
  for experts in trace.experts:
    # float32 counts are exact up to 2**24 tokens, and quick to multiply.
    chosen = membership(experts, trace.num_experts).astype(np.float32)
    both = (chosen.T @ chosen).astype(np.int64)
    of_expert = np.diag(both).astype(float)
    np.fill_diagonal(both, 0)
    expected = np.outer(of_expert, of_expert)
    np.fill_diagonal(expected, 0)
    # The experts of a token are different: random pairs are fewer than those
    # of independent choices.
    expected *= both.sum() / max(expected.sum(), 1)
    lift = np.full(both.shape, np.nan)
    np.divide(both, expected, where=expected > 0, out=lift)
    counts.append(both)
    lifts.append(lift)
  return Pairs(np.stack(counts), np.stack(lifts))


def across_layers(trace: Trace) -> Pairs:
  """Returns the pairs of first choices in a layer of experts and the next one.

  Matrix i has a row for each expert of layer i, and a column for each expert of
  layer i + 1. Tokens without an expert in one of them are left out.

  Args:
    trace: Routing of the tokens, in successive layers.
  """
  num_experts = trace.num_experts
  first = trace.experts[:, :, 0].astype(np.int64)
  counts = np.zeros((len(first) - 1, num_experts, num_experts), np.int64)
  for i, (before, after) in enumerate(itertools.pairwise(first)):
    both = (before < num_experts) & (after < num_experts)
    pair = before[both] * num_experts + after[both]
    counts[i] = np.bincount(pair, minlength=num_experts**2).reshape(
      counts.shape[1:]
    )
  return Pairs(counts, lift_of(counts))
