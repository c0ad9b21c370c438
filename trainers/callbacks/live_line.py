"""Figures of a line that shows the progress of a run while it trains."""

import datetime
import time

from trainers.callbacks.callback import Callback

# Text of each phase of Clock without steps.
_PHASES = {
  'compile': 'compiling the step',
  'evaluate': 'evaluating',
  'checkpoint': 'saving',
  'end': 'ending',
}


class LiveLine(Callback):
  """Base class of callbacks that show step, loss, speed, time left and best.

  It shows figures of Progress and must be listed after it.
  """

  def __init__(self):
    self._loss = self._speed = ''
    self._first_step, self._start = 0, None

  def on_train_step_end(self, loop):
    if self._start is None:  # The first step includes compilation: not timed.
      self._first_step, self._start = loop.step, time.monotonic()

  def on_log(self, loop, metrics):
    self._loss = f'loss {metrics["train/loss"]:.4f}'
    if 'steps_per_sec' in metrics:
      self._speed = f'{metrics["steps_per_sec"]:.2f} steps/s'

  def line(self, loop) -> str:
    """Returns the figures of this moment."""
    eta = ''
    is_running = loop.status == 'running'
    if is_running and self._start and (done := loop.step - self._first_step):
      seconds = (time.monotonic() - self._start) / done
      left = round(seconds * (loop.num_train_steps - loop.step))
      eta = f'ETA {datetime.timedelta(seconds=left)}'
    texts = [
      f'{loop.step}/{loop.num_train_steps}',
      self._loss,
      self._speed,
      eta,
      f'best {loop.best.value:.4f}' if loop.best else '',
      _PHASES.get(loop.clock.current, '') if is_running else loop.status,
    ]
    return '  '.join(text for text in texts if text)
