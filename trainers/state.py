"""What a training step reads and writes: arrays, and nothing but arrays."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

Params = Any
ModelState = Any


@struct.dataclass
class TrainState:
  """Everything that resuming needs, beside what the callbacks remember.

  Attributes:
    step: int32, batches attempted, 1..N after a step.
    batch_index: int32, the next batch to train on; equals `step` unless data
      was skipped.
    skipped: int32, updates that were refused because they were not finite.
    params: what the optimizer updates.
    opt_state: the optimizer's.
    model_state: what the task changes without gradients (router biases).
    average: of params over the updates, exponentially weighted; or None.
  """

  step: jax.Array
  batch_index: jax.Array
  skipped: jax.Array
  params: Params
  opt_state: optax.OptState
  model_state: ModelState
  average: Params | None = None

  @classmethod
  def create(
    cls,
    params: Params,
    model_state: ModelState,
    optimizer: optax.GradientTransformation,
    *,
    average: bool = False,
  ) -> 'TrainState':
    """Of step 0; with an average, which begins as a copy of params."""
    return cls(
      step=jnp.zeros((), jnp.int32),
      batch_index=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      model_state=model_state,
      average=jax.tree.map(jnp.copy, params) if average else None,
    )
