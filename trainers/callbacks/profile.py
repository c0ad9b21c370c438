"""A trace of a few steps, for TensorBoard's profiler."""

import logging

from clu import profiler
import jax

from trainers.callbacks.callback import Callback

log = logging.getLogger(__name__)


class Profile(Callback):
  """Traces `num_steps` steps, once in each start of the run; 0: never.

  `delay` steps after the start, or sooner where no more steps are left: with
  CLU's periodic Profile, a resumed or a short run may get none. A trace that
  cannot be taken is told of, and training goes on.
  """

  def __init__(self, num_steps: int, delay: int = 10):
    for name, value in (('num_steps', num_steps), ('delay', delay)):
      if value < 0:
        raise ValueError(f'{name}={value} must be >= 0')
    self.num_steps = num_steps
    self.delay = delay
    self._first, self._last = 0, 0  # The step before the trace; its last.
    self._running = False

  def on_fit_start(self, loop):
    left = loop.num_train_steps - loop.step
    if not self.num_steps or left <= 0 or loop.workdir is None:
      return
    self._first = loop.step + max(min(self.delay, left - self.num_steps), 0)
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
      jax.block_until_ready(loop.state)  # No step before belongs to it.
      profiler.start(str(loop.workdir))
      self._running = True
    except Exception as error:  # Another profiler is running, for example.
      log.warning('no profile is taken: %s', error)

  def _stop(self, loop) -> None:
    self._running = False
    with loop.clock.phase('profile'):
      try:
        jax.block_until_ready(loop.state)
      except Exception as error:  # A step that failed: it is told elsewhere.
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
