"""The progress line, and speed."""

import datetime
import logging

from trainers.callbacks.callback import Callback

log = logging.getLogger(__name__)


class Progress(Callback):
  """Adds steps_per_sec and tokens_per_sec to the log, and prints a line of it.

  Speed is of training alone: compiling, evaluating and saving do not count.
  The time that is left (ETA) counts everything, as it went so far.
  """

  def __init__(self, tokens_per_step: int):
    self.tokens_per_step = tokens_per_step
    self._steps, self._seconds = 0, 0.0
    self._first_step = 0

  def on_fit_start(self, loop):
    self._first_step = loop.step
    self._start = _seconds(loop)

  def seconds_left(self, loop) -> float:
    """As long for each step as it took so far, evaluations included."""
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
  """Of the run, without those that come once."""
  loop.clock.read('train')
  seconds = loop.clock.seconds
  return sum(seconds.values()) - seconds.get('compile', 0.0)
