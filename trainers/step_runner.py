"""Updates one after another: the device is a few of them ahead of the host."""

from collections import deque
from collections.abc import Callable
from concurrent import futures
import functools
import logging
from typing import Any

import jax

from trainers import metrics as metrics_lib
from trainers.metrics import Metrics
from trainers.runtime import debugging
from trainers.runtime import memory as memory_lib
from trainers.state import TrainState
from trainers.step import StepFn
from trainers.task import Batch

log = logging.getLogger(__name__)

# Steps that may be queued on the device: enough to hide the host, few enough
# to stop, and to notice a failure, soon.
RUN_AHEAD = 2


class StepRunner:
  """(state, batch) -> (state, metrics), which are added up too.

  The state that is given is donated.

  Attributes:
    compiled: whether the first update is done: the only one that is waited for.
    memory: what it needs, once it is compiled.
    accumulated: the metrics since `pop_metrics`, added up.
  """

  def __init__(
    self, step_fn: StepFn, key: jax.Array, memory_hint: memory_lib.Hint
  ):
    # Jitted by itself too: it is traced once for its shapes and its program.
    self._step_fn = jax.jit(step_fn)
    self._key = key
    self._hint = memory_hint
    self._in_flight: deque[Metrics] = deque()
    self._update: futures.Future[Callable[..., Any]] | None = None
    self.compiled = False
    self.memory: memory_lib.StepMemory | None = None

  def trace(self, state: TrainState, batch: Batch) -> Metrics:
    """The metrics' shapes, from those of the state."""
    shapes = jax.eval_shape(self._step_fn, state, batch, self._key)[1]
    self._zeros = self.accumulated = metrics_lib.zeros_like(shapes)
    return shapes

  def compile(self, state: TrainState, batch: Batch) -> None:
    """Begins to, in the background, once; after `trace`, of shapes too."""
    if self._update:
      return
    if debugging.needs_python():
      self._update = futures.Future()
      self._update.set_result(self._debugged)
      return
    update = jax.jit(
      functools.partial(_accumulate, self._step_fn), donate_argnums=0
    ).lower(state, self._zeros, batch, self._key)
    pool = futures.ThreadPoolExecutor(1)
    self._update = pool.submit(update.compile)
    pool.shutdown(wait=False)

  def __call__(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    if not self._update:
      raise ValueError('call compile() first')
    update = self._update.result()
    if not self.compiled:
      memory_lib.trim()
      self._check_memory(update, state)
    state, self.accumulated, metrics = update(
      state, self.accumulated, batch, self._key
    )
    self._in_flight.append(metrics)
    while len(self._in_flight) > (RUN_AHEAD if self.compiled else 0):
      jax.block_until_ready(self._in_flight.popleft())
    self.compiled = True
    return state, metrics

  def pop_metrics(self) -> Metrics:
    """The metrics that were added up; from here on, others are."""
    running, self.accumulated = self.accumulated, self._zeros
    return running

  def explained(self, error: BaseException, step: int) -> BaseException:
    """With what would help, if it is that memory ran out; where a NaN is."""
    error = debugging.located(error, f'after step {step}')
    return memory_lib.explained(error, step, self.memory, self._hint)

  def _debugged(
    self, state: TrainState, running: Metrics, batch: Batch, key: jax.Array
  ) -> tuple[TrainState, Metrics, Metrics]:
    """An update that donates nothing: JAX may have to run it a second time."""
    state, metrics = self._step_fn(state, batch, key)
    # Sums of a checkpoint may hold the loss of an update that was refused.
    with jax.debug_nans(False), jax.debug_infs(False):
      return state, metrics_lib.merge(running, metrics), metrics

  def _check_memory(
    self, update: Callable[..., Any], state: TrainState
  ) -> None:
    """Warns in time: where Linux kills a process, nothing more is told."""
    if not isinstance(update, jax.stages.Compiled):
      return
    self.memory = memory = memory_lib.measure(update, state)
    if memory and not memory.fits:
      log.warning('it may not fit: %s; %s', memory, self._hint(memory))


def _accumulate(step_fn, state, running, batch, key):
  state, metrics = step_fn(state, batch, key)
  return state, metrics_lib.merge(running, metrics), metrics
