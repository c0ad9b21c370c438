"""Summary of a run in result.json, for people and for other tools."""

import logging
import resource
import sys
from typing import Any

import jax

from trainers.callbacks.callback import Callback
from trainers.errors import UserError
from trainers.files import to_json, write_atomically

log = logging.getLogger(__name__)


class Result(Callback):
  """Callback that writes result.json at the start and at every exit.

  The status at the start is 'running'. The callback must be listed last: at the
  end, the result includes the actions of the other callbacks.

  Args:
    facts: Constant facts: versions, devices, argv.
    tokens_per_step: Number of tokens of a batch.
    monitor: Validation metric that is reported as `val_loss`.
    val_metrics: Further validation metrics, {key of the result: metric}.
    train_metrics: Metrics of the training log, {key of the result: metric}.
  """

  def __init__(
    self,
    facts: dict[str, Any],
    tokens_per_step: int,
    monitor: str,
    val_metrics: dict[str, str],
    train_metrics: dict[str, str] | None = None,
  ):
    self.facts = facts
    self.tokens_per_step = tokens_per_step
    self.val_metrics = {'val_loss': monitor, **val_metrics}
    self.train_metrics = {'train_loss': 'loss', **(train_metrics or {})}
    self.latest: dict[str, Any] = {
      **dict.fromkeys(self.train_metrics),
      'skipped_updates': 0,
      **dict.fromkeys(self.val_metrics),
    }
    # Timing of the starts before this one.
    self.earlier: dict[str, Any] = {'steps': 0, 'seconds_by_phase': {}}
    self._loop = None

  def on_fit_start(self, loop):
    self._loop = loop
    self._write(loop)

  def on_log(self, loop, metrics):
    for key, name in self.train_metrics.items():
      self.latest[key] = metrics[f'train/{name}']
    self.latest['skipped_updates'] = metrics['skipped_updates']

  def on_eval_end(self, loop, split, metrics):
    if split == 'val':
      for key, name in self.val_metrics.items():
        self.latest[key] = metrics[f'val/{name}']

  def on_exception(self, loop, error):
    self.facts['error'] = f'{type(error).__name__}: {error}'
    # A refused start must not overwrite the result of an earlier start.
    if self._loop or not isinstance(error, UserError):
      self._write(loop)

  def on_fit_end(self, loop):
    if self._loop:
      self._write(loop)

  def _timing(self, loop) -> dict[str, Any]:
    loop.clock.read('train')
    seconds = dict(self.earlier['seconds_by_phase'])
    for phase, more in loop.clock.seconds.items():
      seconds[phase] = seconds.get(phase, 0.0) + more
    steps = self.earlier['steps'] + loop.num_timed_steps
    return {'steps': steps, 'seconds_by_phase': seconds}

  def _write(self, loop) -> None:
    if not loop.is_first:
      return
    timing = self._timing(loop)
    seconds = timing['seconds_by_phase'].get('train', 0.0)
    rate = timing['steps'] / seconds if timing['steps'] else None
    result = {
      'status': loop.status,
      'stop_reason': loop.stop_reason,
      'rollbacks': loop.num_rollbacks,
      'step': loop.step,
      **self.latest,
      'best_val_loss': loop.best and loop.best.value,
      'best_step': loop.best and loop.best.step,
      'train_seconds': seconds,
      'steps_per_sec': rate,
      'tokens_per_sec': rate and rate * self.tokens_per_step,
      'seconds_by_phase': timing['seconds_by_phase'],
      'peak_memory_bytes': peak_memory_bytes(),
      **self.facts,
    }
    path = loop.workdir / 'result.json'
    try:
      write_atomically(path, to_json(result, indent=2) + '\n')
    except OSError as error:
      log.warning('%s could not be written: %s', path, error)

  def state_dict(self):
    return {
      'latest': self.latest,
      'earlier': self._timing(self._loop),
      'facts': self.facts,  # For a checkpoint without its run.
    }

  def load_state_dict(self, state):
    # Checkpoints of old versions lack some of the keys.
    self.latest = {**self.latest, **state['latest']}
    if not self._loop:  # A rollback keeps the seconds that were spent.
      self.earlier = state['earlier']


def peak_memory_bytes() -> int:
  """Returns the peak memory of the first device, or of this process.

  Returns:
    Bytes of the device if its backend reports them, as accelerators do, or the
    peak resident set size of the process.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
