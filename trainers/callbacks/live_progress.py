"""Progress bar at the bottom of a terminal."""

import datetime
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from trainers.callbacks.callback import Callback

# Text beside the bar in each phase of Clock without steps.
_PHASES = {
  'compile': 'compiling the step',
  'evaluate': 'evaluating',
  'checkpoint': 'saving',
  'end': 'ending',
}


class LiveProgress(Callback):
  """Progress bar with step, loss, speed, time left and best score.

  Log lines scroll above it. A thread draws the bar twice a second, so that
  steps do not wait for the terminal. The callback shows figures of Progress and
  must be listed after it, as the last callback.

  Args:
    console: Console of the bar and of the log lines.
  """

  def __init__(self, console: Console):
    self.console = console
    self._live: Live | None = None
    self._loss = self._speed = ''
    self._first_step, self._start = 0, None

  def on_fit_start(self, loop):
    self._live = Live(
      console=self.console,
      get_renderable=lambda: self._render(loop),
      refresh_per_second=2,
      transient=True,
    )
    self._live.start()
    # The terminal keeps its cursor even if SIGKILL ends this process.
    self.console.show_cursor(True)

  def on_train_step_end(self, loop):
    if self._start is None:  # The first step includes compilation: not timed.
      self._first_step, self._start = loop.step, time.monotonic()

  def on_log(self, loop, metrics):
    self._loss = f'loss {metrics["train/loss"]:.4f}'
    if 'steps_per_sec' in metrics:
      self._speed = f'{metrics["steps_per_sec"]:.2f} steps/s'

  def on_fit_end(self, loop):
    if self._live:
      self._live.stop()

  def _render(self, loop) -> Table:
    eta = ''
    if self._start and (done := loop.step - self._first_step):
      seconds = (time.monotonic() - self._start) / done
      left = round(seconds * (loop.num_train_steps - loop.step))
      eta = f'ETA {datetime.timedelta(seconds=left)}'
    texts = [
      f'{loop.step}/{loop.num_train_steps}',
      self._loss,
      self._speed,
      eta,
      f'best {loop.best.value:.4f}' if loop.best else '',
      _PHASES.get(loop.clock.current, ''),
    ]
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    bar = ProgressBar(loop.num_train_steps, loop.step)
    line.add_row(bar, '  '.join(text for text in texts if text))
    return line
