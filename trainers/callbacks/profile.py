"""Trace of a few steps for TensorBoard's profiler."""

import logging

from clu import profiler
import jax

from trainers.callbacks.callback import Callback

log = logging.getLogger(__name__)


class Profile(Callback):
  """Callback that traces a few steps, once in each start of the run.

  CLU's periodic Profile, in contrast, may trace nothing in a resumed or a short
  run. If no trace can be taken, a warning is logged and training continues. Of
  several processes the first traces its own devices.

  Args:
    num_steps: Number of steps to trace; 0 disables it.
    delay: Number of steps before the trace; fewer if few steps are left.

  Raises:
    ValueError: An argument is negative.
  """

  def __init__(self, num_steps: int, delay: int = 10):
    for name, value in (('num_steps', num_steps), ('delay', delay)):
      if value < 0:
        raise ValueError(f'{name}={value} must be >= 0')
    self.num_steps = num_steps
    self.delay = delay
    # Step before the trace, and last step of the trace.
    self._first, self._last = 0, 0
    self._running = False

  def on_fit_start(self, loop):
    remaining = loop.num_train_steps - loop.step
    if not self.num_steps or remaining <= 0 or loop.workdir is None:
      return
    if not loop.is_first:  # The traces of one host would have the same name.
      return
    delay = max(min(self.delay, remaining - self.num_steps), 0)
    self._first = loop.step + delay
    self._last = min(self._first + self.num_steps, loop.num_train_steps)
    if loop.step == self._first:
      self._start(loop)

  def on_train_step_end(self, loop):
    if self._running and loop.step >= self._last:
      self._stop(loop)
    elif self._last and loop.step == self._first:
      self._start(loop)

  def on_fit_end(self, loop):
    if self._running:
      self._stop(loop)

  def _start(self, loop) -> None:
    try:
      jax.block_until_ready(loop.state)  # Excludes earlier steps.
      profiler.start(str(loop.workdir))
      self._running = True
    except Exception as error:  # Another profiler is running, for example.
      log.warning('no profile is taken: %s', error)

  def _stop(self, loop) -> None:
    self._running = False
    with loop.clock.phase('profile'):
      try:
        jax.block_until_ready(loop.state)
      except Exception as error:  # The trainer reports a step that failed.
        log.debug('while waiting for the last step of a profile: %r', error)
      try:
        profiler.stop()
      except Exception as error:
        log.warning('the profile could not be written: %s', error)
        return
    log.info(
      'profile of steps %d to %d: tensorboard --logdir %s (PROFILE tab: '
      'pip install xprof)',
      self._first + 1,
      min(self._last, loop.step),
      loop.workdir,
    )
