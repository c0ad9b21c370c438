"""Predictability of the first choice from the token, position or last layer.

A layer whose choice follows from the token alone routes by vocabulary: Xue et
al. 2024 (OpenMoE), sec. 4.2, call it context-independent specialization.
"""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
import numpy as np

from nanomoe.inspection.trace import Trace


class Predictability(NamedTuple):
  """Held-out accuracy of a layer's most frequent first choice given a feature.

  Attributes:
    base: Accuracy without a feature: of the layer's most frequent choice.
    token: Accuracy given the token id.
    position: Accuracy given the position in the window.
    previous: Accuracy given the first choice in the layer of experts before;
      NaN in the first one.
    num_held_out: Number of tokens that accuracies are measured on, by layer.
  """

  base: Float[np.ndarray, ' layers']
  token: Float[np.ndarray, ' layers']
  position: Float[np.ndarray, ' layers']
  previous: Float[np.ndarray, ' layers']
  num_held_out: Int[np.ndarray, ' layers']


def predictability(
  trace: Trace, text: Int[np.ndarray, ' tokens']
) -> Predictability:
  """Returns how well features predict the first choice of each layer.

  Of each text, windows of even number are counted, and those of odd number are
  predicted. A single window is divided in the middle. A feature that was not
  counted is predicted as without a feature. Tokens without an expert are left
  out.

  Args:
    trace: Routing of the tokens, in successive layers.
    text: Index of each token's text, increasing.
  """
  is_counted = np.concatenate(
    [_is_counted(trace.windows[text == i]) for i in np.unique(text)]
  )
  windows = trace.windows
  first = trace.experts[:, :, 0].astype(np.int64)
  nothing = np.zeros(len(windows), np.int64)
  rows = []
  for i, choice in enumerate(first):
    features = [nothing, trace.tokens, trace.positions]
    features += [first[i - 1]] if i else []
    found = [
      accuracy(np.asarray(x, np.int64), choice, is_counted, trace.num_experts)
      for x in features
    ]
    rows.append([*found, *[np.nan] * (4 - len(found))])
  base, token, position, previous = np.array(rows).T
  num_held_out = np.count_nonzero(
    ~is_counted & (first < trace.num_experts), axis=1
  )
  return Predictability(base, token, position, previous, num_held_out)


def _is_counted(
  windows: Int[np.ndarray, ' tokens'],
) -> Bool[np.ndarray, ' tokens']:
  """Returns whether each token of a text is counted."""
  if windows[0] == windows[-1]:
    return np.arange(len(windows)) < len(windows) / 2
  return (windows - windows[0]) % 2 == 0


def accuracy(
  feature: Int[np.ndarray, ' tokens'],
  choice: Int[np.ndarray, ' tokens'],
  is_counted: Bool[np.ndarray, ' tokens'],
  num_experts: int,
) -> float:
  """Returns the held-out accuracy of the most frequent choice of a feature.

  Args:
    feature: Feature of each token, >= 0.
    choice: First choice of each token; `num_experts` for none.
    is_counted: Whether a token is counted; the others are predicted.
    num_experts: Number of experts.
  """
  has_expert = choice < num_experts
  counted, tested = is_counted & has_expert, ~is_counted & has_expert
  if not tested.any():
    return np.nan
  size = int(feature.max()) + 1
  cells = feature[counted] * num_experts + choice[counted]
  counts = np.bincount(cells, minlength=size * num_experts)
  counts = counts.reshape(size, num_experts)
  common = counts.sum(axis=0).argmax()
  guess = np.where(counts.any(axis=1), counts.argmax(axis=1), common)
  return float(np.mean(guess[feature[tested]] == choice[tested]))
