"""Optimizers, as chains of Optax transformations built from a config."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from nanomoe.config import schema
from nanomoe.model import parameters
from nanomoe.schedules import SCHEDULES
from trainers import spec
from trainers.errors import UserError

# Functions from parameters to a tree of whether they decay, by the value of
# `optimizer.decay_mask`; None decays all.
DECAY_MASKS = {'all': None, 'matrices': parameters.matrices}


def adamw(
  learning_rate: optax.Schedule,
  weight_decay: float,
  mask: Any,
  beta1: float,
  beta2: float,
) -> optax.GradientTransformation:
  """Returns AdamW. Loshchilov and Hutter 2019.

  Args:
    learning_rate: Learning rate of each update.
    weight_decay: Decoupled weight decay, multiplied by the learning rate.
    mask: Value of `DECAY_MASKS`.
    beta1: Decay rate of the first moment.
    beta2: Decay rate of the second moment.
  """
  return optax.adamw(
    learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=mask
  )


def lion(
  learning_rate: optax.Schedule,
  weight_decay: float,
  mask: Any,
  beta1: float,
  beta2: float,
) -> optax.GradientTransformation:
  """Returns Lion: the sign of an interpolated momentum. Chen et al. 2023.

  The authors take beta2 = 0.99, a third to a tenth of AdamW's learning rate,
  and three to ten times AdamW's weight decay.

  Args:
    learning_rate: Learning rate of each update.
    weight_decay: Decoupled weight decay, multiplied by the learning rate.
    mask: Value of `DECAY_MASKS`.
    beta1: Weight of the momentum in an update.
    beta2: Decay rate of the momentum.
  """
  return optax.lion(
    learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=mask
  )


def adafactor(
  learning_rate: optax.Schedule,
  weight_decay: float,
  mask: Any,
  beta1: float,
  beta2: float,
) -> optax.GradientTransformation:
  """Returns Adafactor: a factored second moment. Shazeer and Stern 2018.

  It has the changes of Zhai et al. 2021: a momentum, and updates that are not
  relative to the parameters' size, so that AdamW's learning rates apply. The
  second moment is factored into rows and columns along the two largest axes if
  both have 128 elements or more. Other second moments are kept whole. Updates
  are clipped for each array, and the stacked layers of `model.scan_layers` are
  one array.

  Args:
    learning_rate: Learning rate of each update.
    weight_decay: Decoupled weight decay, multiplied by the learning rate.
    mask: Value of `DECAY_MASKS`.
    beta1: Decay rate of the momentum.
    beta2: Upper limit of the second moment's decay rate, `1 - t**-0.8`.
  """

  def decay(step, exponent):
    return jnp.minimum(beta2, 1 - (step + 1.0) ** -exponent)

  return optax.chain(
    optax.scale_by_factored_rms(decay_rate_fn=decay),
    optax.clip_by_block_rms(1.0),
    optax.ema(beta1, debias=False),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def muon(
  learning_rate: optax.Schedule,
  weight_decay: float,
  mask: Any,
  beta1: float,
  beta2: float,
  muon_beta: float = 0.95,
) -> optax.GradientTransformation:
  """Returns Muon: the orthogonalized momentum of hidden matrices.

  Jordan et al. 2024, with AdamW's updates for all other parameters.
  The table `nanomoe.model.parameters.KINDS` says which parameters are hidden
  matrices. Each matrix of an array `[..., D, F]`, such as an expert's, is
  orthogonalized by itself.

  One learning rate serves all parameters. Updates of a matrix have the size of
  AdamW's: `0.2 * sqrt(max(D, F))` times the orthogonal matrix. Liu et al. 2025.
  This size does not depend on the gradient's size. An expert without tokens
  therefore continues in the direction of its momentum.

  Args:
    learning_rate: Learning rate of each update.
    weight_decay: Decoupled weight decay, multiplied by the learning rate.
    mask: Value of `DECAY_MASKS`.
    beta1: Decay rate of the first moment of parameters with AdamW's updates.
    beta2: Decay rate of their second moment.
    muon_beta: Decay rate of the momentum of hidden matrices, from 0 to 1.

  Raises:
    ValueError: `muon_beta` is outside [0, 1).
  """
  if not 0 <= muon_beta < 1:
    raise ValueError(f'{muon_beta=} must be >= 0 and < 1')

  def labels(params):
    is_hidden = parameters.hidden_matrices(params)
    return jax.tree.map(lambda hidden: 'muon' if hidden else 'adam', is_hidden)

  def last_two_axes(params):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)

  def scaled(updates, _):
    return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)

  orthogonal = optax.chain(
    contrib.scale_by_muon(
      beta=muon_beta, weight_dimension_numbers=last_two_axes
    ),
    optax.stateless(scaled),
  )
  return optax.chain(
    optax.partition(
      {'muon': orthogonal, 'adam': optax.scale_by_adam(beta1, beta2)}, labels
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


# Optimizers by name.
OPTIMIZERS = {
  'AdamW': adamw,
  'Lion': lion,
  'Adafactor': adafactor,
  'Muon': muon,
}


def build(
  config: schema.Optimizer, num_train_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns a config's gradient clipping and optimizer, and its schedule.

  The optimizer is handed the following arguments if its signature names them:
  `learning_rate` (the schedule), `weight_decay`, `mask` (a value of
  `DECAY_MASKS`), `beta1`, `beta2` and `num_train_steps`.

  Args:
    config: Section `optimizer` of a config.
    num_train_steps: Number of steps of the run.

  Returns:
    The transformation of gradients, and the learning rate of each update.

  Raises:
    UserError: A type is unknown, does not accept an argument, or makes
      something else.
  """
  schedule = spec.build(
    'optimizer.schedule',
    config.schedule.to_dict(),
    SCHEDULES,
    learning_rate=config.learning_rate,
    num_train_steps=num_train_steps,
  )
  if not callable(schedule):
    raise UserError(
      f'optimizer.schedule.type={config.schedule.type!r} made a '
      f'{type(schedule).__name__}; it must be an optax.Schedule'
    )
  arguments = {
    key: value
    for key, value in config.to_dict().items()
    if schema.spec_of(f'optimizer.{key}') == 'optimizer'
  }
  optimizer = spec.build(
    'optimizer',
    arguments,
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
      f'optimizer.type={config.type!r} made a {type(optimizer).__name__}; it '
      'must be an optax.GradientTransformation'
    )
  # An identity keeps clipping's place in the state: a resumed run may change
  # `clip_norm`, and its arrays are found by their path.
  clip = (
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  return optax.chain(clip, optimizer), cast(optax.Schedule, schedule)
