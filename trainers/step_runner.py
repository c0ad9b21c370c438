"""Runner of compiled training steps, which queues steps on the device."""

from collections import deque
from collections.abc import Callable
from concurrent import futures
import functools
import logging
from typing import Any

import jax

from trainers import metrics as metrics_lib
from trainers.mesh import Placement
from trainers.metrics import Metrics
from trainers.runtime import debugging, watchdog
from trainers.runtime import memory as memory_lib
from trainers.state import TrainState
from trainers.step import StepFn
from trainers.task import Batch

log = logging.getLogger(__name__)

# Steps queued on the device. More would delay stopping and noticing a failure;
# fewer would leave the device waiting for the host.
RUN_AHEAD = 2


class StepRunner:
  """Function (state, batch) -> (state, metrics) that also accumulates metrics.

  A call donates its state.

  Args:
    step_fn: Training step.
    key: Random key of the run.
    memory_hint: Suggests how to reduce memory.
    placement: Shardings of the run's arrays.

  Attributes:
    compiled: Whether the first step is done. Only the first call waits for it.
    memory: Memory that a step needs; None before the first step.
    accumulated: Metrics since the last `pop_metrics`, merged.
  """

  def __init__(
    self,
    step_fn: StepFn,
    key: jax.Array,
    memory_hint: memory_lib.Hint,
    placement: Placement,
  ):
    # The inner jit caches the trace, which shapes and program share.
    self._step_fn = jax.jit(step_fn)
    self._placement = placement
    self._key = placement.put(key)
    self._hint = memory_hint
    self._in_flight: deque[Metrics] = deque()
    self._update: futures.Future[Callable[..., Any]] | None = None
    self.compiled = False
    self.memory: memory_lib.StepMemory | None = None

  def trace(self, state: TrainState, batch: Batch) -> Metrics:
    """Traces a step, without compiling it.

    Args:
      state: State or its shapes.
      batch: Batch or its shapes.

    Returns:
      Shapes of the metrics.
    """
    shapes = jax.eval_shape(self._step_fn, state, batch, self._key)[1]
    zeros = self._placement.put(metrics_lib.zeros_like(shapes))
    self._zeros = self.accumulated = zeros
    return shapes

  def compile(self, state: TrainState, batch: Batch) -> None:
    """Starts to compile the step in the background, unless it has started.

    `trace` must be called first.

    Args:
      state: State, or its shapes with their shardings.
      batch: Batch, or its shapes with their shardings.
    """
    if self._update:
      return
    if debugging.needs_python():
      self._update = futures.Future()
      self._update.set_result(self._debugged)
      return
    arguments = state, self._zeros, batch, self._key
    update = lower(self._step_fn, self._placement, *arguments)
    pool = futures.ThreadPoolExecutor(1)
    self._update = pool.submit(update.compile)
    pool.shutdown(wait=False)

  def __call__(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, Metrics]:
    if not self._update:
      raise ValueError('call compile() first')
    # This process compiles alone, however long that takes.
    while not self.compiled and not futures.wait([self._update], 1).done:
      watchdog.beat()
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
    """Returns the accumulated metrics and resets them."""
    running, self.accumulated = self.accumulated, self._zeros
    return running

  def explained(self, error: BaseException, step: int) -> BaseException:
    """Returns errors of memory and of NaNs explained; others unchanged.

    Args:
      error: Error of a training step.
      step: Number of completed steps.
    """
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
    """Warns before the first step: Linux may kill the process without one."""
    if not isinstance(update, jax.stages.Compiled):
      return
    self.memory = memory = memory_lib.measure(update, state)
    if memory and not memory.fits:
      log.warning('it may not fit: %s; %s', memory, self._hint(memory))


def lower(
  step_fn: StepFn,
  placement: Placement,
  state: TrainState,
  running: Metrics,
  batch: Batch,
  key: jax.Array,
) -> jax.stages.Lowered:
  """Returns the lowered step of a run, which also accumulates metrics.

  The arguments are arrays, or shapes with their shardings.

  Args:
    step_fn: Training step.
    placement: Shardings of the run's arrays.
    state: State, which the step donates.
    running: Metrics to add to.
    batch: Batch.
    key: Random key of the run.
  """
  replicated = placement.replicated
  return jax.jit(
    functools.partial(_accumulate, step_fn),
    donate_argnums=0,
    # XLA would choose others, which the next step would refuse.
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, state),
      replicated,
      replicated,
    ),
  ).lower(state, running, batch, key)


def _accumulate(step_fn, state, running, batch, key):
  state, metrics = step_fn(state, batch, key)
  return state, metrics_lib.merge(running, metrics), metrics
