"""Training step as a pure function: (state, batch, key) -> (state, metrics)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainers import metrics as metrics_lib
from trainers.accumulate import make_gradient
from trainers.metrics import Last, Mean, Metrics
from trainers.state import Params, TrainState
from trainers.task import Batch, Task

StepFn = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


class Spikes(NamedTuple):
  """Limit of the loss, above which an update is refused as a spike.

  The limit is `factor` times the median loss of the last `window` accepted
  updates. No update is refused before there are `window` accepted ones. Losses
  must be positive.

  Attributes:
    factor: Factor of the limit; 0 disables it. The state does not depend on the
      factor, so that a resumed run may change it.
    window: Number of accepted updates.
  """

  factor: float
  window: int


def all_finite(tree) -> jax.Array:
  """Returns whether all leaves of `tree` are finite, as bool `[]`."""
  leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  ema_decay: float = 0.0,
  spikes: Spikes | None = None,
  accumulate_steps: int = 1,
) -> StepFn:
  """Returns a function that does one training step.

  The step refuses an update that is not finite or a spike. A refused update
  increments the counters of the state and leaves the rest unchanged.

  Args:
    task: Task that gives the loss and the update of the model state.
    optimizer: Optax transformation of gradients.
    schedule: Learning rate by the number of accepted updates. It is only
      reported; the optimizer has its own.
    ema_decay: Largest decay of the average in the state, if the state has one.
      The decay of update t is min(ema_decay, (1 + t) / (10 + t)).
    spikes: Limit of the loss, or None. The state must have `spikes.window`
      recent losses.
    accumulate_steps: Number of micro-batches, as in `make_gradient`.

  Returns:
    (state, batch, key) -> (state, metrics), which can be jitted.

  Raises:
    ValueError: The task cannot accumulate gradients, as in `make_gradient`.
  """
  gradient = make_gradient(task, accumulate_steps)

  def train_step(state, batch, key):
    loss, total, aux, grads = gradient(
      state.params,
      state.model_state,
      batch,
      jax.random.fold_in(key, state.step),
    )
    gradient_norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    num_updates = state.step - state.skipped
    params = optax.apply_updates(state.params, updates)
    new = (
      params,
      opt_state,
      task.advance(state.model_state, aux.statistics),
      _averaged(state.average, params, num_updates, ema_decay),
      _appended(state.recent_losses, loss),
    )
    old = (
      state.params,
      state.opt_state,
      state.model_state,
      state.average,
      state.recent_losses,
    )
    accepted = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    accepted &= all_finite(updates)
    if spikes and spikes.factor:
      # The window has empty places until as many updates were accepted.
      is_full = num_updates >= len(state.recent_losses)
      limit = spikes.factor * jnp.median(state.recent_losses)
      accepted &= ~(is_full & (loss > limit))
    params, opt_state, model_state, average, recent_losses = jax.tree.map(
      lambda n, o: jnp.where(accepted, n, o), new, old
    )
    skipped = state.skipped + (~accepted).astype(jnp.int32)
    metrics = {
      'train/loss': Mean(total.sum, total.weight),
      **metrics_lib.prefixed('train', aux.metrics),
      'gradient_norm': Mean(gradient_norm, jnp.ones((), jnp.float32)),
      'learning_rate': Last(jnp.asarray(schedule(num_updates), jnp.float32)),
      'skipped_updates': Last(skipped),
    }
    state = state.replace(
      step=state.step + 1,
      batch_index=state.batch_index + 1,
      skipped=skipped,
      skipped_in_a_row=jnp.where(accepted, 0, state.skipped_in_a_row + 1),
      params=params,
      opt_state=opt_state,
      model_state=model_state,
      average=average,
      recent_losses=recent_losses,
    )
    return state, metrics

  return train_step


def _averaged(
  average: Params | None, params: Params, num_updates: jax.Array, decay: float
) -> Params | None:
  """Returns d * average + (1 - d) * params.

  d = min(decay, (1 + t) / (10 + t)), where t is the number of previous updates.
  The smaller d of early updates reduces the weight of the initial parameters.
  """
  if average is None:
    return None
  d = jnp.minimum(decay, (1 + num_updates) / (10 + num_updates))
  # Under JAX_ENABLE_X64, d is float64, whatever the parameters are.
  return jax.tree.map(
    lambda a, p: (d * a + (1 - d) * p).astype(a.dtype), average, params
  )


def _appended(recent: jax.Array | None, loss: jax.Array) -> jax.Array | None:
  if recent is None:
    return None
  return jnp.append(recent[1:], loss.astype(recent.dtype))
