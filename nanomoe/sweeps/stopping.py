"""Median stopping rule: poor runs end early, whatever the order of events.

Golovin et al., "Google Vizier: A Service for Black-Box Optimization" (2017),
section 3.2.1: a run stops at step s if its best loss by step s is larger than
the median, over other runs, of the mean loss by step s.

The other runs are those before it in the order of the sweep. So the step at
which a run stops depends on recorded losses only, not on which run was faster
or was killed. A process may train past that step; its later losses do not
count.
"""

from collections.abc import Sequence
import math
import statistics
from typing import NamedTuple

from nanomoe.sweeps.outcomes import Point

# Fewer runs say little about a median. Ray Tune and Katib have this default.
MIN_RUNS = 3


class Progress(NamedTuple):
  """Evaluations of a run.

  Attributes:
    points: Evaluations so far.
    is_final: Whether no evaluation will be added.
  """

  points: Sequence[Point]
  is_final: bool


def stops(runs: Sequence[Progress]) -> list[int | None]:
  """Returns the step at which each run stops.

  Args:
    runs: Runs in the order of the sweep.

  Returns:
    Steps; None for a run that does not stop, or about which nothing is known
    because a run before it has not reached the step.
  """
  # For each run before: its points until it stops, and the step up to which it
  # is certain that it goes on.
  before: list[tuple[Sequence[Point], float]] = []
  found = []
  for run in runs:
    kept, certain, stop = [], -1.0, None
    for point in run.points:
      if any(point.step > other_certain for _, other_certain in before):
        break
      kept.append(point)
      certain = point.step
      if _is_poor(kept, [points for points, _ in before]):
        stop = point.step
        break
    is_known = stop is not None or (
      run.is_final and len(kept) == len(run.points)
    )
    before.append((kept, math.inf if is_known else certain))
    found.append(stop)
  return found


def _is_poor(own: Sequence[Point], others: Sequence[Sequence[Point]]) -> bool:
  """Returns whether a run stops at its last point.

  Args:
    own: Points of the run so far.
    others: Points of other runs. Those without this step are not compared.
  """
  step = own[-1].step
  means = []
  for points in others:
    if any(point.step == step for point in points):
      losses = [_ordered(p.loss) for p in points if p.step <= step]
      means.append(statistics.fmean(losses))
  if len(means) < MIN_RUNS:
    return False
  best = min(_ordered(point.loss) for point in own)
  return best > statistics.median(means)


def _ordered(loss: float) -> float:
  """Returns a loss that can be compared; NaN is the largest."""
  return math.inf if math.isnan(loss) else loss
