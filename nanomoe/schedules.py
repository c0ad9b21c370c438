"""Learning rates over steps: functions of the updates so far.

A warm-up is linear from 0 at the first update to `learning_rate` at the update
`warmup_steps`, counted from 0. So the first update changes nothing but the
optimizer's state.
"""

import logging

import optax

log = logging.getLogger(__name__)


def constant(learning_rate: float) -> optax.Schedule:
  return optax.constant_schedule(learning_rate)


def warmup_cosine(
  learning_rate: float,
  num_train_steps: int,
  warmup_steps: int = 100,
  final_fraction: float = 0.1,
) -> optax.Schedule:
  """Linear from 0, then half a cosine to final_fraction * learning_rate."""
  _check(num_train_steps, warmup_steps, final_fraction)
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
  _check(num_train_steps, warmup_steps, final_fraction)
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
  if decay_steps < 1:
    raise ValueError(f'{decay_steps=} must be >= 1')
  _check(num_train_steps, warmup_steps, final_fraction)
  if warmup_steps < num_train_steps < warmup_steps + decay_steps:
    log.warning(
      'optimizer.schedule.decay_steps=%d: with warmup_steps=%d it must be at '
      'most %d, or num_train_steps=%d ends the decay early',
      decay_steps,
      warmup_steps,
      num_train_steps - warmup_steps,
      num_train_steps,
    )
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


def _check(
  num_train_steps: int, warmup_steps: int, final_fraction: float
) -> None:
  if warmup_steps < 0:
    raise ValueError(f'{warmup_steps=} must be >= 0')
  if not 0 <= final_fraction <= 1:
    raise ValueError(f'{final_fraction=} must be in [0, 1]')
  if warmup_steps >= num_train_steps:
    log.warning(
      'optimizer.schedule.warmup_steps=%d: it must be below num_train_steps=%d,'
      ' or the learning rate never reaches optimizer.learning_rate',
      warmup_steps,
      num_train_steps,
    )


SCHEDULES = {
  'constant': constant,
  'warmup_cosine': warmup_cosine,
  'linear': linear,
  'wsd': wsd,
}
