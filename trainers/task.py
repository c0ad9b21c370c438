"""The two things a user brings: what is learned, and from what."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from trainers import metrics as metrics_lib
from trainers.state import ModelState, Params

Batch = Mapping[str, np.ndarray | jax.Array]


class Total(NamedTuple):
  """A loss as a sum and a weight, both float32 scalars.

  It is divided once: after accumulation, and over all devices.
  """

  sum: jax.Array
  weight: jax.Array


class Aux(NamedTuple):
  """What a loss reports: metrics, and statistics that `advance` gets.

  Statistics are additive over micro-batches and devices (expert loads).
  """

  metrics: metrics_lib.Metrics
  statistics: Any = ()


class Task(Protocol):
  """What is trained. Its functions are pure, and traced."""

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, ModelState]: ...

  def loss(
    self,
    params: Params,
    model_state: ModelState,
    batch: Batch,
    key: jax.Array,
    *,
    train: bool,
  ) -> tuple[Total, Aux]: ...

  def advance(self, model_state: ModelState, statistics: Any) -> ModelState:
    """The model state after one accepted update."""
    ...


@runtime_checkable
class Dataset(Protocol):
  """Where batches come from: functions of their index, so no iterator to save.

  `rows` is the part of the global batch that this process feeds.
  """

  fingerprint: str

  def train_batch(self, index: int, rows: slice) -> Batch: ...

  def eval_batches(self, split: str, rows: slice) -> Iterable[Batch]:
    """A finite pass over `split`, the same at each call."""
    ...
