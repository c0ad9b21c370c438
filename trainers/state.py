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
    skipped: int32, updates that were refused: not finite, or a spike.
    skipped_in_a_row: int32, the newest of them without an accepted one between.
    params: what the optimizer updates.
    opt_state: the optimizer's.
    model_state: what the task changes without gradients (router biases).
    average: of params over the updates, exponentially weighted; or None.
    recent_losses: float32[window], of accepted updates, the newest last; 0
      where there was none yet (NaN in checkpoints of older versions); or None.
  """

  step: jax.Array
  batch_index: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  params: Params
  opt_state: optax.OptState
  model_state: ModelState
  average: Params | None = None
  recent_losses: jax.Array | None = None

  @classmethod
  def create(
    cls,
    params: Params,
    model_state: ModelState,
    optimizer: optax.GradientTransformation,
    *,
    average: bool = False,
    window: int = 0,
  ) -> 'TrainState':
    """Of step 0; with an average, which begins as a copy of params.

    `window`: of recent_losses; 0: none are kept.
    """
    return cls(
      step=jnp.zeros((), jnp.int32),
      batch_index=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      skipped_in_a_row=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.init(params),
      model_state=model_state,
      average=jax.tree.map(jnp.copy, params) if average else None,
      recent_losses=jnp.zeros(window, jnp.float32) if window else None,
    )
