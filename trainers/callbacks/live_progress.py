"""A bar at the bottom of a terminal."""

import datetime
import time

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from trainers.callbacks.callback import Callback

# Of Clock: what is said where no step is being done.
_PHASES = {
  'compile': 'compiling the step',
  'evaluate': 'evaluating',
  'checkpoint': 'saving',
  'end': 'ending',
}


class LiveProgress(Callback):
  """Step, loss, speed, time left and the best score; log lines scroll above it.

  Drawn twice a second by a thread of its own: a step costs nothing.

  List it last, and after Progress, whose figures it shows.

  Args:
    console: where log lines are drawn too.
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
    # Whatever ends this process, even kill -9: the terminal has its cursor.
    self.console.show_cursor(True)

  def on_train_step_end(self, loop):
    if self._start is None:  # The step before this compiled.
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
