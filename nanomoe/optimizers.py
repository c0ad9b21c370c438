"""Optax chains, from config."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from nanomoe.config import schema
from nanomoe.schedules import SCHEDULES
from trainers import spec
from trainers.errors import UserError


def _is_matrix(path: Any, leaf: Any) -> bool:
  """Whether it multiplies: no bias, scale, filter or embedding does."""
  name = jax.tree_util.keystr(path[-1:], simple=True)
  is_other = name.startswith('b_') or 'embedding' in name or name == 'filter'
  return leaf.ndim >= 2 and not is_other


def _matrices(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(_is_matrix, params)


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


def lion(
  learning_rate: optax.Schedule,
  weight_decay: float,
  mask: Any,
  beta1: float,
  beta2: float,
) -> optax.GradientTransformation:
  """The sign of an interpolated momentum. Chen et al. 2023.

  Its authors take beta2 = 0.99, a third to a tenth of AdamW's learning rate,
  and as many times its weight decay.
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
  """Shazeer and Stern 2018: the second moment as a row's times a column's.

  With the changes of Zhai et al. 2021: momentum (beta1), steps that are not
  relative to the parameters' size, so that learning rates are AdamW's, and
  beta2 as the limit of 1 - t**-0.8. Rows and columns are those of the two
  largest axes, if both have 128 or more; other second moments are whole.
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
  """Each hidden matrix's momentum, made orthogonal. Jordan et al. 2024.

  Of an array [..., D, F] each matrix by itself: an expert's, for example.
  Embeddings, the head, biases and norms have AdamW's updates, by beta1 and
  beta2; routers' kernels are hidden matrices.

  One learning rate serves all, as matrices' updates have the size of AdamW's:
  0.2 * sqrt(max(D, F)) times the orthogonal matrix. Liu et al. 2025. That size
  does not depend on the gradient's, so an expert that gets no tokens goes on in
  the direction that its momentum had.
  """
  if not 0 <= muon_beta < 1:
    raise ValueError(f'{muon_beta=} must be >= 0 and < 1')

  def kind(path, leaf):
    is_head = jax.tree_util.keystr(path[:1], simple=True) == 'head'
    return 'muon' if _is_matrix(path, leaf) and not is_head else 'adam'

  def last_two(params):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)

  def scaled(updates, _):
    return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)

  orthogonal = optax.chain(
    contrib.scale_by_muon(beta=muon_beta, weight_dimension_numbers=last_two),
    optax.stateless(scaled),
  )
  return optax.chain(
    optax.partition(
      {'muon': orthogonal, 'adam': optax.scale_by_adam(beta1, beta2)},
      functools.partial(jax.tree_util.tree_map_with_path, kind),
    ),
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


OPTIMIZERS = {
  'AdamW': adamw,
  'Lion': lion,
  'Adafactor': adafactor,
  'Muon': muon,
}


def build(
  config: schema.Optimizer, num_train_steps: int
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
  if not callable(schedule):
    raise UserError(
      f'optimizer.schedule.type={config.schedule.type!r} must return an '
      f'optax.Schedule, not {schedule!r}'
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
  return optax.chain(clip, optimizer), cast(optax.Schedule, schedule)
