"""A learning rate that rises when a run is resumed."""

import logging
import math

import jax
import jax.numpy as jnp
import optax

from trainers.metrics import Metrics
from trainers.state import TrainState

log = logging.getLogger(__name__)


def warn_if_raised(
  schedule: optax.Schedule,
  state: TrainState,
  metrics: Metrics,
  num_train_steps: int,
) -> None:
  """Warns if another schedule than before raises the learning rate.

  A schedule that decays until the last step is another one as soon as
  `num_train_steps` is.

  Args:
    schedule: The schedule of the steps to come.
    state: The state of a checkpoint.
    metrics: The metrics of the checkpoint's step.
    num_train_steps: The number of steps of the whole run.
  """
  step = int(state.step)
  if not 0 < step < num_train_steps:  # Step 0 has had no learning rate.
    return
  # Compiled as in the step: it is rounded as in the step.
  rate = jax.jit(lambda n: jnp.asarray(schedule(n), jnp.float32))
  num_updates = step - int(state.skipped)
  last = num_updates - (int(state.skipped_in_a_row) == 0)
  before = float(jax.device_get(metrics['learning_rate']).compute())
  if math.isclose(float(rate(jnp.int32(last))), before, rel_tol=1e-4):
    return
  now = float(rate(jnp.int32(num_updates)))
  if now > before:
    log.warning(
      'the learning rate rises from %.4g (step %d) to %.4g (step %d): the '
      'schedule has changed, and num_train_steps is %d',
      before,
      step,
      now,
      step + 1,
      num_train_steps,
    )
