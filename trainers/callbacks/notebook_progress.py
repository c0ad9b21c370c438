"""Progress bar in the output of a notebook's cell."""

from collections.abc import Callable, Mapping
import html
import time
from typing import Any

from trainers.callbacks.live_line import LiveLine

SECONDS = 0.5  # Between two updates: each is a message to the browser.


class NotebookProgress(LiveLine):
  """Progress bar with the figures of a line, which replaces itself.

  Args:
    display: Function that shows a MIME bundle, and returns a handle whose
      `update` replaces it: `IPython.display.display`.
  """

  def __init__(self, display: Callable[..., Any]):
    super().__init__()
    self._display = display
    self._handle: Any = None
    self._shown = 0.0

  def on_fit_start(self, loop):
    self._handle = self._display(self._bundle(loop), raw=True, display_id=True)
    self._shown = time.monotonic()

  def on_train_step_end(self, loop):
    super().on_train_step_end(loop)
    if time.monotonic() - self._shown > SECONDS:
      self._update(loop)

  def on_fit_end(self, loop):
    if self._handle:
      self._update(loop)

  def _update(self, loop) -> None:
    self._handle.update(self._bundle(loop), raw=True)
    self._shown = time.monotonic()

  def _bundle(self, loop) -> Mapping[str, str]:
    line = self.line(loop)
    bar = f'<progress value="{loop.step}" max="{loop.num_train_steps}">'
    text = f'<code>{html.escape(line)}</code>'
    return {'text/plain': line, 'text/html': f'{bar}</progress> {text}'}
