"""Learning rates over steps: functions of the updates so far."""

import optax


def constant(learning_rate: float) -> optax.Schedule:
  return optax.constant_schedule(learning_rate)


def warmup_cosine(
  learning_rate: float,
  num_train_steps: int,
  warmup_steps: int = 100,
  final_fraction: float = 0.1,
) -> optax.Schedule:
  """Linear from 0, then half a cosine to final_fraction * learning_rate."""
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
  """Linear from 0, then linear to final_fraction * learning_rate."""
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
  """Warm-up, stable, decay: linear, constant, linear. Hu et al. 2024."""
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
  if warmup_steps < 0:
    raise ValueError(f'{warmup_steps=} must be >= 0')
  if not 0 <= final_fraction <= 1:
    raise ValueError(f'{final_fraction=} must be in [0, 1]')


SCHEDULES = {
  'constant': constant,
  'warmup_cosine': warmup_cosine,
  'linear': linear,
  'wsd': wsd,
}
