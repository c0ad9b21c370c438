"""The routing's part in a model's loss and metrics, over all layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.moe import losses as losses_lib
from nanomoe.moe import statistics as statistics_lib
from nanomoe.moe.layer import MoEAux
from nanomoe.moe.losses import BALANCE
from trainers.metrics import (
  Entropy,
  Last,
  MaxOverMean,
  Mean,
  Metrics,
  MutualInformation,
  ShareOfZeros,
  Sum,
)


class Known(NamedTuple):
  """Sums over a batch that the losses of its micro-batches need.

  Attributes:
    weight: Sum of the weights of tokens.
    tokens: Number of tokens without padding.
    sequences: Number of sequences that are not padding alone.
    load: Loads of the balance loss, `int32[layers, experts]`; None if the loss
      needs none. They are 0 while the loss has weight 0.
  """

  weight: jax.Array
  tokens: jax.Array
  sequences: jax.Array
  load: jax.Array | None


def count(weights: Float[Array, 'batch time'], load: Any = None) -> Known:
  """Returns the sums of a micro-batch.

  Args:
    weights: Weights of tokens, 0 for padding.
    load: Loads of the balance loss, as in `Known`.
  """
  mask = weights > 0
  sequences = jnp.sum(mask.any(axis=1))
  return Known(jnp.sum(weights), jnp.sum(mask), sequences, load)


def loss_and_metrics(
  aux: MoEAux,
  balance: str,
  aux_weight: Float[Array, ''],
  weights: Mapping[str, float],
  weight: Float[Array, ''],
  known: Known | None = None,
  *,
  train: bool,
) -> tuple[Float[Array, ''], Metrics]:
  """Returns the loss that is added to the mean cross-entropy, and metrics.

  For a micro-batch, both are its parts in the loss and the metrics of the whole
  batch. `batch_metrics` replaces the metrics that have no parts.

  Args:
    aux: Report of all layers, `[layers, ...]`.
    balance: Definition of the balance loss, a key of `losses.BALANCE`.
    aux_weight: Weight of the balance loss.
    weights: Weights of the other losses, by name.
    weight: Sum of the weights of tokens.
    known: Sums over the whole batch; None if `aux` is that of a whole batch.
    train: Whether weighted losses are reported. Evaluation adds none of them.
  """
  tokens = known and known.tokens
  is_of_sequences = BALANCE[balance].of_sequences
  balanced = losses_lib.value(
    aux.losses['balance'],
    known.sequences if known and is_of_sequences else tokens,
    known and known.load,
  )
  losses = {
    'aux_loss': BALANCE[balance].join(balanced),
    **{
      name: jnp.mean(losses_lib.value(aux.losses[name], tokens))
      for name in weights
    },
  }
  all_weights = {'aux_loss': aux_weight, **weights}
  weighted = {name: all_weights[name] * loss for name, loss in losses.items()}
  # Parts in a loss add up to it; they are not averaged over micro-batches.
  scale = known.weight if known else weight
  weighted_metrics: Metrics = {
    **{
      f'weighted_{name}': Mean(x * scale, weight)
      for name, x in weighted.items()
    },
    'aux_weight': Last(aux_weight),
  }
  # A loss of weight 0 is left out: it may be infinite.
  added = ['aux_loss', *(name for name, w in weights.items() if w)]
  load = aux.load.astype(jnp.float32)
  return jnp.stack([weighted[name] for name in added]).sum(), {
    **{name: Mean(x * scale, weight) for name, x in losses.items()},
    **(weighted_metrics if train else {}),
    'expert_load': Mean(load, jnp.sum(load, axis=-1, keepdims=True)),
    'load_entropy': Entropy(load),
    'max_over_mean_load': MaxOverMean(load),
    'max_vio': statistics_lib.max_vio(load),
    'dead_experts': ShareOfZeros(load),
    **aux.metrics,
  }


def statistics(aux: MoEAux, weight: Float[Array, '']) -> dict[str, Any]:
  """Returns what micro-batches add up to for `batch_metrics`.

  Args:
    aux: Report of all layers.
    weight: Sum of the weights of tokens.
  """
  balance = aux.losses['balance']
  return {'expert_load': aux.load, 'balance': balance, 'weight': weight}


def batch_metrics(sums: Mapping[str, Any], balance: str) -> Metrics:
  """Returns the metrics that are no sums over micro-batches.

  Args:
    sums: `statistics`, summed over the micro-batches.
    balance: Definition of the balance loss, a key of `losses.BALANCE`.
  """
  loss = BALANCE[balance].join(losses_lib.value(sums['balance']))
  load = sums['expert_load'].astype(jnp.float32)
  return {
    'aux_loss': Mean(loss * sums['weight'], sums['weight']),
    'max_vio': statistics_lib.max_vio(load),
  }


def choice_metrics(
  aux: MoEAux,
  inputs: Int[Array, 'batch time'],
  watched: Int[Array, ' watched'],
  *,
  train: bool,
) -> Metrics:
  """Returns metrics of choices: by pairs of layers, and by token.

  Evaluations report the counts of pairs too, from which pictures are drawn.

  Args:
    aux: Report of all layers.
    inputs: Token ids.
    watched: Token ids whose experts an evaluation counts.
    train: Whether the model is training.
  """
  num_experts = aux.load.shape[-1]
  metrics: Metrics = {}
  # Experts that choose tokens give no token a first choice.
  if aux.token is None:
    pairs = statistics_lib.first_choice_pairs(aux.expert, num_experts)
    metrics['co_activation'] = MutualInformation(pairs)
    metrics |= {} if train else {'first_choices': Sum(pairs)}
  if watched.size and not train:
    counts = statistics_lib.token_expert_counts(
      aux.expert, aux.token, inputs, watched, num_experts
    )
    metrics['token_experts'] = Sum(counts)
  return metrics
