"""Progress bar at the bottom of a terminal."""

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from trainers.callbacks.live_line import LiveLine


class LiveProgress(LiveLine):
  """Progress bar with the figures of a line.

  Log lines scroll above it. A thread draws the bar twice a second, so that
  steps do not wait for the terminal. It must be the last callback.

  Args:
    console: Console of the bar and of the log lines.
  """

  def __init__(self, console: Console):
    super().__init__()
    self.console = console
    self._live: Live | None = None

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

  def on_fit_end(self, loop):
    if self._live:
      self._live.stop()

  def _render(self, loop) -> Table:
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(ProgressBar(loop.num_train_steps, loop.step), self.line(loop))
    return line
