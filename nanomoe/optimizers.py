"""Optax chains and learning-rate schedules, from config."""

from typing import Any

import jax
import optax

from nanomoe import schema
from nanomoe.config import Config
from trainers import spec
from trainers.errors import UserError


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


def _matrices(params: Any) -> Any:
  """True for what multiplies: not for biases, norms' scales or embeddings."""

  def is_matrix(path, leaf):
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return (
      leaf.ndim >= 2 and not name.startswith('b_') and ('embedding' not in name)
    )

  return jax.tree_util.tree_map_with_path(is_matrix, params)


DECAY_MASKS = {'all': None, 'matrices': _matrices}


def adamw(
  learning_rate: optax.Schedule,
  weight_decay: float,
  mask: Any,
  beta1: float,
  beta2: float,
) -> optax.GradientTransformation:
  """Loshchilov and Hutter 2019."""
  return optax.adamw(
    learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=mask
  )


OPTIMIZERS = {'AdamW': adamw}


def build(
  config: Config, num_train_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """What `config.optimizer` says: clipping, then the optimizer.

  An optimizer gets, of learning_rate (a schedule), weight_decay, mask (what it
  applies to: a function of the parameters, or None), beta1, beta2 and
  num_train_steps, those that its signature names, and its own arguments.

  Raises:
    UserError: a type is unknown, or has other arguments.
  """
  schedule = spec.build(
    'optimizer.schedule',
    config.schedule.to_dict(),
    SCHEDULES,
    learning_rate=config.learning_rate,
    num_train_steps=num_train_steps,
  )
  own = {
    key: value
    for key, value in config.to_dict().items()
    if schema.spec_of(f'optimizer.{key}') == 'optimizer'
  }
  optimizer = spec.build(
    'optimizer',
    own,
    OPTIMIZERS,
    learning_rate=schedule,
    weight_decay=config.weight_decay,
    mask=DECAY_MASKS[config.decay_mask],
    beta1=config.beta1,
    beta2=config.beta2,
    num_train_steps=num_train_steps,
  )
  if not isinstance(optimizer, optax.GradientTransformation):
    raise UserError(
      f'optimizer.type={config.type!r} must return an '
      f'optax.GradientTransformation, not {optimizer!r}'
    )
  # Present or not, it has a place in the state: clipping may change in a run.
  clip = (
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  return optax.chain(clip, optimizer), schedule
