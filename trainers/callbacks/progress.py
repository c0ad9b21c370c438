"""Progress line, with speed and time left."""

import datetime
import logging

from trainers.callbacks.callback import Callback

log = logging.getLogger(__name__)


class Progress(Callback):
  """Callback that logs a progress line and adds speed to the metrics.

  It adds steps_per_sec and tokens_per_sec. They exclude compiling, evaluating
  and saving. The time left (ETA) includes evaluating and saving.

  Args:
    tokens_per_step: Number of tokens of a batch.
  """

  def __init__(self, tokens_per_step: int):
    self.tokens_per_step = tokens_per_step
    self._steps, self._seconds = 0, 0.0
    self._first_step = 0

  def on_fit_start(self, loop):
    self._first_step = loop.step
    self._start = _seconds(loop)

  def seconds_left(self, loop) -> float:
    """Returns the time left in seconds, from the mean time of a step so far."""
    done = loop.step - self._first_step
    elapsed = _seconds(loop) - self._start
    return (loop.num_train_steps - loop.step) * elapsed / max(done, 1)

  def on_log(self, loop, metrics):
    steps, seconds = loop.num_timed_steps, loop.clock.read('train')
    if steps > self._steps:
      rate = (steps - self._steps) / (seconds - self._seconds)
      metrics['steps_per_sec'] = rate
      metrics['tokens_per_sec'] = rate * self.tokens_per_step
    self._steps, self._seconds = steps, seconds
    left = self.seconds_left(loop)
    speed = (
      f'{metrics["steps_per_sec"]:.2f} steps/s  '
      f'{metrics["tokens_per_sec"]:,.0f} tokens/s  '
      if 'steps_per_sec' in metrics
      else ''
    )
    log.info(
      'step %*d/%d  loss %.4f  %sETA %s',
      len(str(loop.num_train_steps)),
      loop.step,
      loop.num_train_steps,
      metrics['train/loss'],
      speed,
      datetime.timedelta(seconds=round(left)),
    )


def _seconds(loop) -> float:
  """Returns the seconds of this start, without compiling, which comes once."""
  loop.clock.read('train')
  seconds = loop.clock.seconds
  return sum(seconds.values()) - seconds.get('compile', 0.0)
