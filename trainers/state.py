"""Arrays that a training step reads and writes."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import optax

Params = Any
ModelState = Any


@struct.dataclass
class TrainState:
  """State of training, with all that a resume needs but callbacks' states.

  Attributes:
    step: Number of steps done, 0 to N; int32 scalar.
    batch_index: Index of the next batch; equals `step` unless a rollback
      skipped batches; int32 scalar.
    skipped: Number of refused updates, not finite or spikes; int32 scalar.
    skipped_in_a_row: Number of refused updates since the last accepted one;
      int32 scalar.
    params: Parameters, which the optimizer updates.
    opt_state: State of the optimizer.
    model_state: State that the task updates without gradients, for example
      router biases.
    average: Exponentially weighted average of `params` over the updates, or
      None.
    recent_losses: Losses of the last accepted updates, oldest first; float32
      `[window]`, or None. Empty places hold 0, in checkpoints of older versions
      NaN.
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
    """Returns the state of step 0.

    Args:
      params: Initial parameters.
      model_state: Initial model state.
      optimizer: Optax transformation of gradients.
      average: Whether to keep an average, which begins as a copy of `params`.
      window: Number of recent losses to keep; 0 keeps none.
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
