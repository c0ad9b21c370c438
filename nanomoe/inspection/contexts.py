"""Contexts that activate an expert most: the tokens of its highest weights."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanomoe.inspection.trace import Trace

NUM_CONTEXTS = 5  # Contexts of an expert.
RADIUS = 24  # Characters on each side of a token.
_SAME = 2  # Characters before a token by which two contexts are equal.


class Context(NamedTuple):
  """Token with its neighbours.

  Attributes:
    before: Characters before the token.
    token: Characters of the token.
    after: Characters after the token.
    weight: Weight of the expert.
  """

  before: str
  token: str
  after: str
  weight: float


def contexts(
  trace: Trace,
  layer: int,
  expert: int,
  pieces: Sequence[str],
  text: np.ndarray,
) -> list[Context]:
  """Returns the contexts with the highest weights of an expert, highest first.

  Two tokens with equal text after equal characters are one context. Among equal
  weights, earlier tokens are taken.

  Args:
    trace: Routing of the tokens.
    layer: Index into `trace.layers`.
    expert: Expert.
    pieces: Characters of each token.
    text: Index of each token's text; a context does not leave its text.
  """
  token, rank = np.nonzero(trace.experts[layer] == expert)
  weights = trace.weights[layer, token, rank]
  found: dict[tuple[str, str], Context] = {}
  for i in np.argsort(-weights, kind='stable').tolist():
    if len(found) == NUM_CONTEXTS:
      break
    at = int(token[i])
    # A token has a character or none: this many neighbours are enough.
    begin, end = max(at - 4 * RADIUS, 0), at + 4 * RADIUS
    own = [
      piece if inside else ''
      for piece, inside in zip(
        pieces[begin:end], text[begin:end] == text[at], strict=True
      )
    ]
    before = ''.join(own[: at - begin])[-RADIUS:]
    after = ''.join(own[at - begin + 1 :])[:RADIUS]
    key = before[-_SAME:].casefold(), pieces[at].casefold()
    context = Context(before, pieces[at], after, float(weights[i]))
    found.setdefault(key, context)
  return list(found.values())
