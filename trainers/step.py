"""The pure steps: (state, batch, key) -> (state, metrics)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainers import metrics as metrics_lib
from trainers.metrics import Last, Mean, Metrics
from trainers.state import Params, TrainState
from trainers.task import Batch, Task

StepFn = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


class Spikes(NamedTuple):
  """Losses above `factor` times the median of the last `window`: refused.

  Only losses of accepted updates are among the last, and nothing is refused
  before there are as many. A loss must be positive. With a factor of 0 nothing
  is refused; the state is the same, so that a run may change the factor.
  """

  factor: float
  window: int


def all_finite(tree) -> jax.Array:
  """bool[]: no leaf holds an infinity or a NaN."""
  leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.stack(leaves))


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  ema_decay: float = 0.0,
  spikes: Spikes | None = None,
) -> StepFn:
  """One update. A non-finite one is counted and otherwise leaves no trace.

  So is one that is among `spikes`, if they are given; then the state must have
  as many recent_losses.

  `schedule` is only reported: it is the learning rate at the number of updates
  so far, as the optimizer's own counter sees it.

  `ema_decay` is of the state's average, if it has one: see `_averaged`.
  """

  def train_step(state, batch, key):
    def loss_fn(params):
      total, aux = task.loss(
        params,
        state.model_state,
        batch,
        jax.random.fold_in(key, state.step),
        train=True,
      )
      return total.sum / total.weight, (total, aux)

    (loss, (total, aux)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params
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
      # Until as many updates were accepted, places of the window are empty.
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
  """d * average + (1 - d) * params, with d = min(decay, (1 + t) / (10 + t)).

  t is the number of updates before: what training begins with is soon
  forgotten.
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
