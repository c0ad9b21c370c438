"""Language modelling as a `trainers.task.Task`."""

from collections.abc import Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.model.transformer import DecodeCache
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
from trainers.task import Aux, Batch, Total


class LanguageModel:
  """Next-token cross-entropy, plus the routers' weighted losses.

  And, in training, a penalty of confident predictions: `confidence_weight`
  times their negative entropy. Pereyra et al. 2017, sec. 3.2.

  Batches: inputs and targets int32[B, T]; weights float32[B, T], 0 for padding.

  model_state: `aux_weight`, which a callback may change while training; `bias`,
  float32[layers, experts], if routers have one: it selects experts.

  Args:
    model: a module (tokens, mask, past, bias, train) -> (logits, MoEAux,
      past); None for MoEAux if there are no experts: their metrics are then
      missing.
    aux_weight: of the balance loss, at the start.
    balance: how it is joined over layers: a name in balance.BALANCE.
    token_bytes: the UTF-8 of each token; None: one ASCII character each.
    z_weight: of the routers' z-loss, the mean over layers.
    entropy_weight: of the routers' entropy, the mean over layers.
    confidence_weight: of the predictions' negative entropy.
    bias_rate: by which an update moves an expert's bias, towards an even load;
      0: there is none.
    watched: the tokens that evaluations count the experts of: `token_experts`.
  """

  def __init__(
    self,
    model: nn.Module,
    aux_weight: float,
    balance: str,
    token_bytes: Sequence[bytes] | None = None,
    *,
    z_weight: float = 0.0,
    entropy_weight: float = 0.0,
    confidence_weight: float = 0.0,
    bias_rate: float = 0.0,
    watched: Sequence[int] = (),
  ):
    self.model = model
    self.aux_weight = aux_weight
    self.balance = balance
    self.weights = {'z_loss': z_weight, 'router_entropy': entropy_weight}
    self.confidence_weight = confidence_weight
    self.bias_rate = bias_rate
    self.watched = np.array(watched, np.int32)
    self._num_bytes = self._num_chars = None
    if token_bytes is not None:
      self._num_bytes = np.array([len(b) for b in token_bytes], np.float32)
      self._num_chars = np.array(
        [_num_chars(b) for b in token_bytes], np.float32
      )

  @functools.partial(jax.jit, static_argnums=0)  # Traced once, however used.
  def init(self, key: jax.Array, batch: Batch) -> tuple[Any, Any]:
    inputs = batch['inputs'][:1]
    mask = jnp.ones(inputs.shape, bool)
    output, variables = self.model.init_with_output(
      key, inputs, mask, train=False
    )
    state = {'aux_weight': jnp.float32(self.aux_weight)}
    if self.bias_rate and output[1] is not None:
      state['bias'] = jnp.zeros(output[1].load.shape, jnp.float32)
    return variables['params'], state

  def logits(
    self,
    trained: tuple[Any, Any],
    tokens: Int[Array, 'batch time'],
    past: DecodeCache | None = None,
  ) -> tuple[Float[Array, 'batch time vocab'], DecodeCache]:
    """As evaluation sees them; and what later tokens need of these.

    Args:
      trained: params and model_state.
      tokens: as of the model.
      past: as of the model.
    """
    params, state = trained
    mask = jnp.ones(tokens.shape, bool)
    output: Any = self.model.apply(
      {'params': params}, tokens, mask, past, state.get('bias'), train=False
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
    weights = jnp.asarray(batch['weights'])
    output: Any = self.model.apply(
      {'params': params},
      batch['inputs'],
      weights > 0,
      bias=model_state.get('bias'),
      train=train,
      rngs={'dropout': key, 'routing': key},
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
    total = nats
    if self.confidence_weight or not train:
      entropy = jnp.sum(prediction_entropy(logits) * weights)
      metrics['prediction_entropy'] = Mean(entropy, weight)
      if train:
        total -= self.confidence_weight * entropy
    if aux is None:
      return Total(total, weight), Aux(metrics, {})
    added, more = self._routing(aux, model_state['aux_weight'], weight, train)
    metrics |= more
    metrics |= self._choices(aux, jnp.asarray(batch['inputs']), train)
    total += added * weight
    return Total(total, weight), Aux(metrics, {'expert_load': aux.load})

  def _routing(
    self, aux: MoEAux, aux_weight: jax.Array, weight: jax.Array, train: bool
  ) -> tuple[jax.Array, Metrics]:
    """What is added to the cross-entropy, and metrics."""
    losses = {
      'aux_loss': BALANCE[self.balance].join(aux.losses['balance']),
      **{name: jnp.mean(aux.losses[name]) for name in self.weights},
    }
    weights = {'aux_loss': aux_weight, **self.weights}
    weighted = {name: weights[name] * loss for name, loss in losses.items()}
    shown: Metrics = {  # Evaluation minimizes none of it.
      **{
        f'weighted_{name}': Mean(x * weight, weight)
        for name, x in weighted.items()
      },
      'aux_weight': Last(aux_weight),
    }
    # What has no weight may be infinite.
    added = ['aux_loss', *(name for name, w in self.weights.items() if w)]
    load = aux.load.astype(jnp.float32)
    return jnp.stack([weighted[name] for name in added]).sum(), {
      **{name: Mean(x * weight, weight) for name, x in losses.items()},
      **(shown if train else {}),
      'expert_load': Mean(load, jnp.sum(load, axis=-1, keepdims=True)),
      'load_entropy': Entropy(load),
      'max_over_mean_load': MaxOverMean(load),
      'max_vio': statistics_lib.max_vio(load),
      'dead_experts': ShareOfZeros(load),
      **aux.metrics,
    }

  def _choices(
    self, aux: MoEAux, inputs: Int[Array, 'batch time'], train: bool
  ) -> Metrics:
    """Of experts that were chosen together, or for a token of the vocabulary.

    Evaluations have the counts themselves too, for pictures.
    """
    num_experts = aux.load.shape[-1]
    metrics: Metrics = {}
    if aux.token is None:  # Where experts choose, no choice is a token's first.
      pairs = statistics_lib.first_choice_pairs(aux.expert, num_experts)
      metrics['co_activation'] = MutualInformation(pairs)
      metrics |= {} if train else {'first_choices': Sum(pairs)}
    if self.watched.size and not train:
      watched = jnp.asarray(self.watched)
      counts = statistics_lib.token_expert_counts(
        aux.expert, aux.token, inputs, watched, num_experts
      )
      metrics['token_experts'] = Sum(counts)
    return metrics

  def advance(self, model_state: Any, statistics: Any) -> Any:
    """Wang et al. 2024, algorithm 1: every bias moves by the rate."""
    if 'bias' not in model_state:
      return model_state
    load = statistics['expert_load'].astype(jnp.float32)
    error = jnp.mean(load, axis=-1, keepdims=True) - load
    bias = model_state['bias'] + self.bias_rate * jnp.sign(error)
    return {**model_state, 'bias': bias}


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


def prediction_entropy(
  logits: Float[Array, 'batch time vocab'],
) -> Float[Array, 'batch time']:
  """Of softmax(logits), in nats: what their cross-entropy is if they are right.

  Predictions whose cross-entropy is more are too sure. Guo et al. 2017.
  """
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
