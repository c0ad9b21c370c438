"""Language modelling as a `trainers.task.Task`."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.model import Cache
from nanomoe.routers import BALANCE
from trainers.metrics import MaxOverMean, Mean, Metrics
from trainers.task import Aux, Batch, Total


class LanguageModel:
  """Next-token cross-entropy, plus the routers' weighted balance loss.

  Batches: inputs and targets int32[B, T]; weights float32[B, T], 0 for padding.

  Args:
    model: a module (tokens, mask, cache, train) -> (logits, MoEAux,
      cache).
    aux_weight: of the balance loss.
    balance: how it is joined over layers: a name in routers.BALANCE.
  """

  def __init__(self, model: nn.Module, aux_weight: float, balance: str):
    self.model = model
    self.aux_weight = aux_weight
    self.balance = balance

  def init(self, key: jax.Array, batch: Batch) -> tuple[Any, Any]:
    inputs = batch['inputs'][:1]
    mask = jnp.ones(inputs.shape, bool)
    return self.model.init(key, inputs, mask, train=False)['params'], {}

  def logits(
    self,
    params: Any,
    tokens: Int[Array, 'batch time'],
    cache: Cache | None = None,
  ) -> tuple[Float[Array, 'batch time vocab'], Cache]:
    """As evaluation sees them; and what later tokens need of these."""
    mask = jnp.ones(tokens.shape, bool)
    output: Any = self.model.apply(
      {'params': params}, tokens, mask, cache, train=False
    )
    logits, _, grown = output
    return logits, grown

  def loss(
    self,
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    *,
    train: bool,
  ) -> tuple[Total, Aux]:
    del model_state
    weights = batch['weights']
    output: Any = self.model.apply(
      {'params': params},
      batch['inputs'],
      weights > 0,
      train=train,
      rngs={'dropout': key},
    )
    logits, aux, _ = output
    nats = jnp.sum(
      cross_entropy(logits, jnp.asarray(batch['targets'])) * weights
    )
    weight = jnp.sum(weights)
    aux_loss = BALANCE[self.balance].join(aux.losses['balance'])
    load = aux.load.astype(jnp.float32)
    metrics: Metrics = {
      'cross_entropy': Mean(nats, weight),
      'bits_per_char': Mean(nats / np.log(2), weight),
      'aux_loss': Mean(aux_loss * weight, weight),
      'expert_load': Mean(load, jnp.sum(load, axis=-1, keepdims=True)),
      'max_over_mean_load': MaxOverMean(load),
      **aux.metrics,
    }
    total = Total(nats + self.aux_weight * aux_loss * weight, weight)
    return total, Aux(metrics, {'expert_load': aux.load})

  def advance(self, model_state: Any, statistics: Any) -> Any:
    del statistics
    return model_state


def cross_entropy(
  logits: Float[Array, 'batch time vocab'], targets: Int[Array, 'batch time']
) -> Float[Array, 'batch time']:
  """-log softmax(logits)[target], in nats.

  The target is picked by a mask: the gradient of indexing is a scatter.
  """
  vocab = jnp.arange(logits.shape[-1])
  target = jnp.sum(jnp.where(targets[..., None] == vocab, logits, 0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - target
