"""Clock that divides the wall-clock seconds of a run by phase."""

from collections import defaultdict
import contextlib
import time


class Clock:
  """Clock of phases, in which an inner phase pauses the outer one.

  Attributes:
    seconds: Seconds by phase, without the current stretch; see `read`.
    current: Name of the current phase.
  """

  def __init__(self):
    self.seconds: defaultdict[str, float] = defaultdict(float)
    self.current = 'start'
    self._since = time.perf_counter()

  def _switch(self, phase: str) -> None:
    now = time.perf_counter()
    self.seconds[self.current] += now - self._since
    self.current, self._since = phase, now

  def read(self, phase: str) -> float:
    """Returns the seconds spent in `phase` so far."""
    self._switch(self.current)
    return self.seconds[phase]

  @contextlib.contextmanager
  def phase(self, name: str):
    """Counts the seconds of the block for the phase `name`."""
    outer = self.current
    self._switch(name)
    try:
      yield
    finally:
      self._switch(outer)
