"""Interfaces that a user implements: the task and its data set."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from trainers import metrics as metrics_lib
from trainers.state import ModelState, Params

Batch = Mapping[str, np.ndarray | jax.Array]


class Total(NamedTuple):
  """Loss as a sum and a weight, which are divided after accumulation.

  Attributes:
    sum: Sum of the loss, a float32 scalar.
    weight: Weight of the sum, for example a number of tokens; float32 scalar.
  """

  sum: jax.Array
  weight: jax.Array


class Aux(NamedTuple):
  """Auxiliary results of a loss.

  Attributes:
    metrics: Metrics by name.
    statistics: Statistics for `advance`, for example expert loads. They are
      additive over micro-batches and devices.
  """

  metrics: metrics_lib.Metrics
  statistics: Any = ()


class Part(NamedTuple):
  """Micro-batch of a batch whose gradient is accumulated.

  Attributes:
    index: Number of the micro-batch, m, from 0; int32 scalar.
    count: Number of micro-batches, M. The micro-batch has rows m, m + M, m +
      2 M, ... of the batch.
    known: Sum of `NeedsBatch.survey` over the micro-batches; None for other
      tasks, and inside `survey`.
  """

  index: jax.Array
  count: int
  known: Any = None


class Task(Protocol):
  """Protocol of a task, whose methods are pure functions that JAX traces.

  If gradients are accumulated, `loss` must also take the keyword `part`, the
  `Part` that the batch is. The totals, metrics and statistics of all parts must
  then add up to those of the batch; see `NeedsBatch` for losses that are no
  sums over rows.
  """

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, ModelState]:
    """Returns the initial parameters and model state.

    Args:
      key: Random key.
      batch: Batch that gives the shapes.
    """
    ...

  def loss(
    self,
    params: Params,
    model_state: ModelState,
    batch: Batch,
    key: jax.Array,
    *,
    train: bool,
  ) -> tuple[Total, Aux]:
    """Returns the loss of a batch, with metrics and statistics.

    Args:
      params: Parameters.
      model_state: Model state.
      batch: Batch, `[batch, ...]` each.
      key: Random key of the step, for example for dropout.
      train: Whether the loss is for training, not for evaluation.
    """
    ...

  def advance(self, model_state: ModelState, statistics: Any) -> ModelState:
    """Returns the model state after one accepted update."""
    ...


@runtime_checkable
class NeedsBatch(Protocol):
  """Protocol of a task that needs sums over the batch to accumulate gradients.

  The methods are called in accumulation alone.
  """

  def survey(
    self,
    params: Params,
    model_state: ModelState,
    batch: Batch,
    key: jax.Array,
    part: Part,
  ) -> Any:
    """Returns what the losses of all parts need to know about this part.

    The sum over parts is the `Part.known` of `loss`. It is constant: gradients
    do not pass through it.

    Args:
      params: Parameters.
      model_state: Model state.
      batch: Rows of this part, `[batch / M, ...]` each.
      key: Random key of the step.
      part: The part.

    Returns:
      A pytree of arrays, which are added.
    """
    ...

  def batch_metrics(self, statistics: Any) -> metrics_lib.Metrics:
    """Returns the metrics that are functions of the whole batch's sums.

    The loss of a part leaves these metrics out, or reports placeholders.

    Args:
      statistics: Statistics of the loss, summed over the parts.
    """
    ...


@runtime_checkable
class Dataset(Protocol):
  """Protocol of a data set, whose batches are functions of their index.

  A resume thus needs no saved iterator.

  Attributes:
    fingerprint: Hash of the data, which a resumed run compares.
  """

  fingerprint: str

  def train_batch(self, index: int, rows: slice) -> Batch:
    """Returns a training batch.

    Args:
      index: Index of the batch.
      rows: Rows of the global batch that this process feeds.
    """
    ...

  def eval_batches(self, split: str, rows: slice) -> Iterable[Batch]:
    """Returns a finite pass over `split`, the same at each call.

    Args:
      split: Name of the split.
      rows: Rows of each global batch that this process feeds.
    """
    ...
