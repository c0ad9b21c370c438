"""Loss of runs at equal positions, between recorded evaluations."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Float
import numpy as np

# Name of an axis: its unit.
AXES = {
  'steps': 'steps',
  'tokens': 'tokens',
  'flops': 'FLOPs',
  'seconds': 's',
}
# Name of an axis: its words in figures and notes.
LABELS = {
  'steps': 'steps',
  'tokens': 'tokens',
  'flops': 'training FLOPs',
  'seconds': 'seconds of training',
}


class Curve(NamedTuple):
  """Loss of a run along an axis, one entry per evaluation.

  Attributes:
    positions: Steps, tokens, FLOPs or seconds of training, increasing.
    losses: Validation loss at each position.
  """

  positions: Float[np.ndarray, ' evaluations']
  losses: Float[np.ndarray, ' evaluations']

  def at(self, position: float) -> float:
    """Returns the loss at `position`, linear between two evaluations.

    NaN is returned outside of the evaluations: nothing is extrapolated.
    """
    return float(
      np.interp(
        position, self.positions, self.losses, left=np.nan, right=np.nan
      )
    )


def equal_point(curves: Iterable[Curve]) -> float | None:
  """Returns the largest position that all curves reached.

  None is returned if a curve has its first evaluation behind that position.
  """
  curves = list(curves)
  last = min(curve.positions[-1] for curve in curves)
  first = max(curve.positions[0] for curve in curves)
  return float(last) if first <= last else None
