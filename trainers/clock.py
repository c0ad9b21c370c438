"""Where the wall-clock seconds of a run went."""

from collections import defaultdict
import contextlib
import time


class Clock:
  """Seconds by phase; an inner phase pauses the outer one.

  Attributes:
    seconds: {phase: seconds}; `read` for the current one.
    current: the phase.
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
    """Seconds spent in `phase` so far."""
    self._switch(self.current)
    return self.seconds[phase]

  @contextlib.contextmanager
  def phase(self, name: str):
    outer = self.current
    self._switch(name)
    try:
      yield
    finally:
      self._switch(outer)
