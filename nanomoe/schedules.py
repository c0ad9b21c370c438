"""Learning-rate schedules: functions of the number of updates so far."""

import optax


def constant(learning_rate: float) -> optax.Schedule:
  """Returns a constant schedule.

  Args:
    learning_rate: Learning rate of every update.
  """
  return optax.constant_schedule(learning_rate)


def warmup_cosine(
  learning_rate: float,
  num_train_steps: int,
  warmup_steps: int = 100,
  final_fraction: float = 0.1,
) -> optax.Schedule:
  """Returns a linear warm-up from 0, followed by half a cosine.

  Args:
    learning_rate: Largest learning rate.
    num_train_steps: Number of updates of the run.
    warmup_steps: Number of updates of the linear warm-up; 0 disables it.
    final_fraction: Last learning rate over the largest, from 0 to 1.

  Raises:
    ValueError: An argument is out of range.
  """
  _check(warmup_steps, final_fraction)
  return optax.warmup_cosine_decay_schedule(
    0.0,
    learning_rate,
    warmup_steps,
    max(num_train_steps, warmup_steps + 1),
    end_value=final_fraction * learning_rate,
  )


def linear(
  learning_rate: float,
  num_train_steps: int,
  warmup_steps: int = 100,
  final_fraction: float = 0.0,
) -> optax.Schedule:
  """Returns a linear warm-up from 0, followed by a linear decay.

  Args:
    learning_rate: Largest learning rate.
    num_train_steps: Number of updates of the run.
    warmup_steps: Number of updates of the linear warm-up; 0 disables it.
    final_fraction: Last learning rate over the largest, from 0 to 1.

  Raises:
    ValueError: An argument is out of range.
  """
  _check(warmup_steps, final_fraction)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, learning_rate, warmup_steps),
      optax.linear_schedule(
        learning_rate,
        final_fraction * learning_rate,
        max(num_train_steps - warmup_steps, 1),
      ),
    ],
    [warmup_steps],
  )


def wsd(
  learning_rate: float,
  num_train_steps: int,
  warmup_steps: int = 100,
  decay_steps: int = 1000,
  final_fraction: float = 0.0,
) -> optax.Schedule:
  """Returns warm-up, stable, decay: linear, constant, linear. Hu et al. 2024.

  Args:
    learning_rate: Largest learning rate.
    num_train_steps: Number of updates of the run.
    warmup_steps: Number of updates of the linear warm-up; 0 disables it.
    decay_steps: Number of updates of the decay, the last ones of the run.
    final_fraction: Last learning rate over the largest, from 0 to 1.

  Raises:
    ValueError: An argument is out of range.
  """
  _check(warmup_steps, final_fraction)
  if decay_steps < 1:
    raise ValueError(f'{decay_steps=} must be >= 1')
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, learning_rate, warmup_steps),
      optax.constant_schedule(learning_rate),
      optax.linear_schedule(
        learning_rate, final_fraction * learning_rate, decay_steps
      ),
    ],
    [warmup_steps, max(num_train_steps - decay_steps, warmup_steps)],
  )


def _check(warmup_steps: int, final_fraction: float) -> None:
  """Raises ValueError if an argument is out of range."""
  if warmup_steps < 0:
    raise ValueError(f'{warmup_steps=} must be >= 0')
  if not 0 <= final_fraction <= 1:
    raise ValueError(f'{final_fraction=} must be in [0, 1]')


# Schedules by name.
SCHEDULES = {
  'constant': constant,
  'warmup_cosine': warmup_cosine,
  'linear': linear,
  'wsd': wsd,
}
