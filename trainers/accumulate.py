"""Loss and gradient of a batch, accumulated over its micro-batches.

Micro-batch m of M has rows m, m + M, m + 2 M, ... of the batch. So a device
that holds consecutive rows of the batch holds rows of every micro-batch.
"""

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainers import metrics as metrics_lib
from trainers.state import ModelState, Params
from trainers.task import Aux, Batch, NeedsBatch, Part, Task, Total


class Gradient(NamedTuple):
  """Loss of a batch and its gradient.

  Attributes:
    loss: Loss, a float32 scalar; `total.sum / total.weight`.
    total: Loss as a sum and a weight.
    aux: Metrics and statistics of the batch.
    grads: Gradient of `loss`, of the structure of the parameters.
  """

  loss: jax.Array
  total: Total
  aux: Aux
  grads: Params


GradientFn = Callable[[Params, ModelState, Batch, jax.Array], Gradient]


def make_gradient(task: Task, accumulate_steps: int = 1) -> GradientFn:
  """Returns a function that computes the loss of a batch and its gradient.

  The activations of one micro-batch are in memory at a time. If the task is a
  `NeedsBatch`, a first loop over the micro-batches adds up what their losses
  need to know about the batch.

  Args:
    task: Task that gives the loss.
    accumulate_steps: Number of micro-batches, M; must divide the batch.

  Returns:
    (params, model_state, batch, key) -> Gradient, which can be jitted.

  Raises:
    ValueError: `accumulate_steps` is below 1, or the task's loss takes no
      `part`.
  """
  if accumulate_steps < 1:
    raise ValueError(f'{accumulate_steps=}: it must be >= 1')
  if accumulate_steps == 1:
    return _make_whole(task)
  try:
    inspect.signature(task.loss).bind(*[None] * 4, train=True, part=None)
  except TypeError as error:
    raise ValueError(
      f'{accumulate_steps=}: {type(task).__name__}.loss must take the keyword '
      'part, a trainers.task.Part; without it, only 1 is allowed'
    ) from error
  return _make_accumulated(task, accumulate_steps)


def _make_whole(task: Task) -> GradientFn:
  def gradient(params, model_state, batch, key):
    def loss_fn(params):
      total, aux = task.loss(params, model_state, batch, key, train=True)
      return total.sum / total.weight, (total, aux)

    (loss, (total, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params
    )
    return Gradient(loss, total, aux, grads)

  return gradient


def _make_accumulated(task: Any, num_parts: int) -> GradientFn:
  def survey(index, params, model_state, parts, key):
    part = Part(index, num_parts)
    return task.survey(params, model_state, _take(parts, index), key, part)

  def differentiate(index, params, model_state, parts, key, known):
    def sum_fn(params):
      total, aux = task.loss(
        params,
        model_state,
        _take(parts, index),
        key,
        train=True,
        part=Part(index, num_parts, known),
      )
      return total.sum, (total, aux)

    grads, (total, aux) = jax.grad(sum_fn, has_aux=True)(params)
    return total, aux, grads

  def gradient(params, model_state, batch, key):
    parts = jax.tree.map(lambda x: _split(x, num_parts), batch)
    known = None
    if isinstance(task, NeedsBatch):
      arguments = params, model_state, parts, key
      known = _sum(survey, _added, num_parts, arguments)
    arguments = params, model_state, parts, key, known
    total, aux, grads = _sum(differentiate, _merged, num_parts, arguments)
    if isinstance(task, NeedsBatch):
      metrics = task.batch_metrics(aux.statistics)
      aux = aux._replace(metrics={**aux.metrics, **metrics})
    # Sums of micro-batches are divided once, by the weight of the batch.
    grads = jax.tree.map(lambda g: g / total.weight.astype(g.dtype), grads)
    return Gradient(total.sum / total.weight, total, aux, grads)

  return gradient


def _split(x: jax.Array, num_parts: int) -> jax.Array:
  """Returns `[batch, ...]` as `[batch / M, M, ...]`.

  Raises:
    ValueError: M does not divide the batch.
  """
  if len(x) % num_parts:
    raise ValueError(
      f'accumulate_steps={num_parts}: it must divide the batch of {len(x)}'
    )
  return jnp.reshape(x, (-1, num_parts, *x.shape[1:]))


def _take(parts: Any, index: jax.Array) -> Any:
  """Returns micro-batch `index`, `[batch / M, ...]` each."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, keepdims=False), parts
  )


def _sum(
  fn: Callable[..., Any],
  add: Callable[[Any, Any], Any],
  num_parts: int,
  arguments: tuple,
) -> Any:
  """Returns the sum of `fn(index, *arguments)` over micro-batches."""
  # The inner jit caches the trace, which shapes and loop share.
  fn = jax.jit(fn)
  indices = jnp.arange(num_parts, dtype=jnp.int32)
  shapes = jax.eval_shape(fn, indices[0], *arguments)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  def body(running, index):
    return add(running, fn(index, *arguments)), None

  return jax.lax.scan(body, zeros, indices)[0]


def _added(old: Any, new: Any) -> Any:
  return jax.tree.map(jnp.add, old, new)


def _merged(old: tuple, new: tuple) -> tuple:
  """Returns the sum of two (Total, Aux, gradient)."""
  (old_total, old_aux, old_grads), (total, aux, grads) = old, new
  metrics = metrics_lib.merge(old_aux.metrics, aux.metrics)
  statistics = _added(old_aux.statistics, aux.statistics)
  return (
    _added(old_total, total),
    Aux(metrics, statistics),
    _added(old_grads, grads),
  )
