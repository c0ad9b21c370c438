"""Where the wall-clock seconds of a run went."""

from collections import defaultdict
import contextlib
import time


class Clock:
  """Seconds by phase; an inner phase pauses the outer one."""

  def __init__(self):
    self.seconds: defaultdict[str, float] = defaultdict(float)
    self._phase = 'start'
    self._since = time.perf_counter()

  def _switch(self, phase: str) -> None:
    now = time.perf_counter()
    self.seconds[self._phase] += now - self._since
    self._phase, self._since = phase, now

  def read(self, phase: str) -> float:
    """Seconds spent in `phase` so far."""
    self._switch(self._phase)
    return self.seconds[phase]

  @contextlib.contextmanager
  def phase(self, name: str):
    outer = self._phase
    self._switch(name)
    try:
      yield
    finally:
      self._switch(outer)
