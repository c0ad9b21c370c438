"""Language modelling as a `trainers.task.Task`."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.attention import Cache
from nanomoe.routers import BALANCE
from trainers.metrics import MaxOverMean, Mean, Metrics
from trainers.task import Aux, Batch, Total


class LanguageModel:
  """Next-token cross-entropy, plus the routers' weighted balance loss.

  Batches: inputs and targets int32[B, T]; weights float32[B, T], 0 for padding.

  Args:
    model: a module (tokens, mask, cache, train) -> (logits, MoEAux, cache);
      None for MoEAux if there are no experts: their metrics are then missing.
    aux_weight: of the balance loss.
    balance: how it is joined over layers: a name in routers.BALANCE.
    token_bytes: the UTF-8 of each token; None: one ASCII character each.
  """

  def __init__(
    self,
    model: nn.Module,
    aux_weight: float,
    balance: str,
    token_bytes: Sequence[bytes] | None = None,
  ):
    self.model = model
    self.aux_weight = aux_weight
    self.balance = balance
    self._num_bytes = self._num_chars = None
    if token_bytes is not None:
      self._num_bytes = np.array([len(b) for b in token_bytes], np.float32)
      self._num_chars = np.array(
        [_num_chars(b) for b in token_bytes], np.float32
      )

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
    weights = jnp.asarray(batch['weights'])
    output: Any = self.model.apply(
      {'params': params},
      batch['inputs'],
      weights > 0,
      train=train,
      rngs={'dropout': key},
    )
    logits, aux, _ = output
    targets = jnp.asarray(batch['targets'])
    nats = jnp.sum(cross_entropy(logits, targets) * weights)
    weight = jnp.sum(weights)
    metrics: Metrics = {
      'cross_entropy': Mean(nats, weight),
      'bits_per_char': Mean(
        nats / np.log(2), _sum_of(self._num_chars, targets, weights)
      ),
      'bits_per_byte': Mean(
        nats / np.log(2), _sum_of(self._num_bytes, targets, weights)
      ),
    }
    if aux is None:
      return Total(nats, weight), Aux(metrics, {})
    aux_loss = BALANCE[self.balance].join(aux.losses['balance'])
    load = aux.load.astype(jnp.float32)
    metrics |= {
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


def _num_chars(utf8: bytes) -> int:
  """Characters that begin in it: all bytes but 0b10xxxxxx begin one."""
  return sum(byte & 0xC0 != 0x80 for byte in utf8)


def _sum_of(
  sizes: Float[np.ndarray, ' vocab'] | None,
  targets: Int[Array, 'batch time'],
  weights: Float[Array, 'batch time'],
) -> Float[Array, '']:
  each = 1.0 if sizes is None else jnp.asarray(sizes)[targets]
  return jnp.sum(each * weights)


def cross_entropy(
  logits: Float[Array, 'batch time vocab'], targets: Int[Array, 'batch time']
) -> Float[Array, 'batch time']:
  """-log softmax(logits)[target], in nats.

  The target is picked by a mask: the gradient of indexing is a scatter.
  """
  vocab = jnp.arange(logits.shape[-1])
  target = jnp.sum(jnp.where(targets[..., None] == vocab, logits, 0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - target
