"""Evaluation on one pass over a split, with one compiled function."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from trainers import metrics as metrics_lib
from trainers.mesh import Placement
from trainers.runtime import debugging, keys
from trainers.state import ModelState, Params
from trainers.task import Batch, Task


class Evaluator:
  """Function (params, model_state, batches) -> {metric: value}.

  Metrics are totals over counts of all batches, not means of batch means.

  Args:
    task: Task whose loss reports the metrics.
    placement: Shardings of the run's arrays; None uses one device.
  """

  def __init__(self, task: Task, placement: Placement | None = None):
    self._placement = placement = placement or Placement()

    def metrics(params, model_state, batch):
      key = keys.make(0)  # Unused: evaluation is deterministic.
      _, aux = task.loss(params, model_state, batch, key, train=False)
      return aux.metrics

    def add(running, params, model_state, batch):
      return metrics_lib.merge(running, metrics(params, model_state, batch))

    self._metrics = metrics
    self._add = jax.jit(add, out_shardings=placement.replicated)

  def __call__(
    self,
    params: Params,
    model_state: ModelState,
    batches: Iterable[Batch],
    poll: Callable[[], None] = lambda: None,
  ) -> dict[str, Any]:
    """Evaluates on `batches`.

    Args:
      params: Parameters of the model.
      model_state: Model state, which evaluation does not change.
      batches: Batches of equal shapes.
      poll: Called before each batch. It may raise.

    Returns:
      {metric: value} as Python numbers and lists.

    Raises:
      ValueError: There are no batches.
    """
    running = None
    for batch in batches:
      poll()
      batch = self._placement.put_batch(batch)
      if running is None:
        shapes = jax.eval_shape(self._metrics, params, model_state, batch)
        running = self._placement.put(metrics_lib.zeros_like(shapes))
      previous = running
      with debugging.checked():
        running = self._add(running, params, model_state, batch)
      jax.block_until_ready(previous)  # Limits the queue to one batch.
    if running is None:
      raise ValueError('there is no batch to evaluate on')
    return metrics_lib.compute(running)
