"""Language modeling as a `trainers.task.Task`."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.model.build import (
  accumulation_problem,
  build_router,
  build_transformer,
)
from nanomoe.model.decode_cache import DecodeCache
from nanomoe.moe import objective
from nanomoe.moe.layer import MoEAux
from nanomoe.moe.losses import BALANCE
from nanomoe.ops.chunks import map_chunks
from nanomoe.ops.cross_entropy import cross_entropy, prediction_entropy
from nanomoe.ops.dropout import key_of_rows
from trainers.errors import UserError
from trainers.metrics import Mean, Metrics
from trainers.task import Aux, Batch, Part, Total


class LanguageModel:
  """Language model trained by next-token cross-entropy and routing losses.

  In training, a penalty of confident predictions is added: `confidence_weight`
  times their negative entropy. Pereyra et al. 2017, sec. 3.2.

  A batch holds `inputs` and `targets`, `int32[batch, time]`, and `weights`,
  `float32[batch, time]`, which are 0 for padding.

  model_state holds `aux_weight`, the weight of the balance loss, which a
  callback may change during training. If routers have a bias, it also holds
  `bias`, `float32[layers, experts]`, which is added to the scores that select
  experts.

  Args:
    model: Module `(tokens, mask, cache, bias, length, *, train) -> (logits,
      MoEAux, cache)`, such as `Transformer`. Without layers of experts, MoEAux
      is None and metrics of routing are missing.
    aux_weight: Initial weight of the balance loss.
    balance: Definition of the balance loss, a key of `losses.BALANCE`.
    token_bytes: UTF-8 encoding of each token of the vocabulary; None if each
      token is one ASCII character.
    z_weight: Weight of the routers' z-loss, a mean over layers.
    entropy_weight: Weight of the routers' entropy, a mean over layers.
    confidence_weight: Weight of the predictions' negative entropy.
    bias_rate: Change of an expert's bias by one update, towards balanced loads;
      0 if routers have no bias.
    watched: Token ids whose experts are counted by evaluations, as the metric
      `token_experts`.
    logits_chunk: Number of tokens of each sequence whose logits exist at a time
      in the loss; 0 for all. Others than 0 need a model that takes `finish`, as
      `Transformer` does.
    num_tokens: Number of tokens of the tokenizer; None for all logits of the
      model. Later logits are those of padding: the loss includes them, and no
      sample can draw them.
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
    logits_chunk: int = 0,
    num_tokens: int | None = None,
  ):
    self.model = model
    self.aux_weight = aux_weight
    self.balance = balance
    self.weights = {'z_loss': z_weight, 'router_entropy': entropy_weight}
    self.confidence_weight = confidence_weight
    self.bias_rate = bias_rate
    self.watched = np.array(watched, np.int32)
    self.logits_chunk = logits_chunk
    self.num_tokens = num_tokens
    self._num_bytes = self._num_chars = None
    if token_bytes is not None:
      self._num_bytes = np.array([len(b) for b in token_bytes], np.float32)
      self._num_chars = np.array(
        [_num_chars(b) for b in token_bytes], np.float32
      )

  # Compiled, so that it is traced once for all of its uses.
  @functools.partial(jax.jit, static_argnums=0)
  def init(self, key: jax.Array, batch: Batch) -> tuple[Any, Any]:
    """Returns initial parameters and model_state.

    Args:
      key: Random key of the parameters.
      batch: Batch of the shape of those to train on.
    """
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
    cache: DecodeCache | None = None,
    length: Int[Array, ' batch'] | None = None,
  ) -> tuple[Float[Array, 'batch time vocab'], DecodeCache]:
    """Returns the logits of the tokenizer's tokens, and the decode cache.

    They are those of an evaluation.

    Args:
      trained: Pair of params and model_state.
      tokens: Token ids, from position 0 on, or after those in the cache.
      cache: Decode cache of the tokens before; None at the beginning of a
        window.
      length: Number of tokens in each sequence, after which there is padding;
        None without padding.
    """
    params, state = trained
    mask = jnp.ones(tokens.shape, bool)
    output: Any = self.model.apply(
      {'params': params},
      tokens,
      mask,
      cache,
      state.get('bias'),
      length,
      train=False,
    )
    logits, _, new_cache = output
    return logits[..., : self.num_tokens], new_cache

  def loss(
    self,
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    *,
    train: bool,
    part: Part | None = None,
  ) -> tuple[Total, Aux]:
    """Returns the loss, and its metrics and statistics.

    Args:
      params: Parameters.
      model_state: State of the model beside its parameters.
      batch: Batch of windows.
      key: Random key of dropout and routing.
      train: Whether the losses of training are added to the cross-entropy.
      part: Micro-batch that `batch` is; None for a whole batch. Its `known` is
        that of `survey`.
    """
    weights = jnp.asarray(batch['weights'])
    targets = jnp.asarray(batch['targets'])
    with_entropy = bool(self.confidence_weight) or not train

    def scores(logits, targets):
      entropy = prediction_entropy(logits) if with_entropy else None
      return cross_entropy(logits, targets), entropy

    def in_chunks(head, x):
      return map_chunks(
        lambda x, targets: scores(head(x), targets),
        self.logits_chunk,
        x,
        targets,
      )

    finish = in_chunks if self.logits_chunk else None
    result, aux = self._apply(
      params, model_state, batch, key, train, part, finish
    )
    each, entropy = result if finish else scores(result, targets)
    nats = jnp.sum(each * weights)
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
    if entropy is not None:
      entropy = jnp.sum(entropy * weights)
      metrics['prediction_entropy'] = Mean(entropy, weight)
      if train:
        total -= self.confidence_weight * entropy
    if aux is None:
      return Total(total, weight), Aux(metrics, {})
    known = part and part.known
    routing_loss, routing_metrics = objective.loss_and_metrics(
      aux,
      self.balance,
      model_state['aux_weight'],
      self.weights,
      weight,
      known,
      train=train,
    )
    metrics |= routing_metrics
    metrics |= objective.choice_metrics(
      aux,
      jnp.asarray(batch['inputs']),
      jnp.asarray(self.watched),
      train=train,
    )
    total += routing_loss * (known.weight if known else weight)
    return Total(total, weight), Aux(metrics, objective.statistics(aux, weight))

  def survey(
    self,
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    part: Part,
  ) -> objective.Known:
    """Returns the sums that the losses of all micro-batches need.

    Loads take a forward pass. It is skipped if the balance loss is of sequences
    or has weight 0.

    Args:
      params: Parameters.
      model_state: State of the model beside its parameters.
      batch: Windows of the micro-batch.
      key: Random key of dropout and routing.
      part: The micro-batch.
    """

    def count(params, model_state, batch, key, index):
      own = Part(index, part.count)
      aux: Any = self._apply(params, model_state, batch, key, True, own)[1]
      return aux and aux.losses['balance'].load

    load = None
    if not BALANCE[self.balance].of_sequences:
      # The jit caches the trace, which shapes and branch share.
      count = jax.jit(count)
      arguments = params, model_state, batch, key, part.index
      shape = jax.eval_shape(count, *arguments)
      if shape is not None:
        # A callback may change the weight, so that it is no constant.
        load = jax.lax.cond(
          model_state['aux_weight'] != 0,
          count,
          lambda *_: jnp.zeros(shape.shape, shape.dtype),
          *arguments,
        )
    return objective.count(jnp.asarray(batch['weights']), load)

  def batch_metrics(self, statistics: Any) -> Metrics:
    """Returns the metrics that are no sums over micro-batches.

    Args:
      statistics: Statistics of `loss`, summed over the micro-batches.
    """
    if not statistics:  # There are no experts.
      return {}
    return objective.batch_metrics(statistics, self.balance)

  def _apply(
    self,
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    train: bool,
    part: Part | None,
    finish: Callable[..., Any] | None = None,
  ) -> tuple[Any, MoEAux | None]:
    """Returns the logits, or the result of `finish`, and the routing report."""
    if part is not None:
      key = key_of_rows(key, part.index, part.count)
    replaced: Any = {'finish': finish} if finish else {}
    output: Any = self.model.apply(
      {'params': params},
      batch['inputs'],
      jnp.asarray(batch['weights']) > 0,
      bias=model_state.get('bias'),
      train=train,
      rngs={'dropout': key, 'routing': key},
      **replaced,
    )
    result, aux, _ = output
    return result, aux

  def advance(self, model_state: Any, statistics: Any) -> Any:
    """Returns model_state after an update: every bias moves by `bias_rate`.

    Wang et al. 2024, algorithm 1: biases of experts below the mean load
    increase, and those above it decrease.

    Args:
      model_state: State before the update.
      statistics: Loads of the update's batch, as returned by `loss`.
    """
    if 'bias' not in model_state:
      return model_state
    load = statistics['expert_load'].astype(jnp.float32)
    error = jnp.mean(load, axis=-1, keepdims=True) - load
    bias = model_state['bias'] + self.bias_rate * jnp.sign(error)
    return {**model_state, 'bias': bias}


def build_task(
  config: Config,
  vocab_size: int,
  token_bytes: Sequence[bytes] | None = None,
  watched: Sequence[int] = (),
  mesh: Mesh | AbstractMesh | None = None,
) -> LanguageModel:
  """Returns the task of a config.

  Args:
    config: Whole config, without 'auto'.
    vocab_size: Number of tokens in the vocabulary.
    token_bytes: UTF-8 encoding of each token, as in `LanguageModel`.
    watched: Token ids whose experts are counted, as in `LanguageModel`.
    mesh: Mesh of the run; None for one device.

  Raises:
    UserError: The router or the attention cannot be built, the vocabulary does
      not fit, or gradients cannot be accumulated.
  """
  moe = config.moe
  router = build_router(config, vocab_size)
  if problem := accumulation_problem(config, router):
    raise UserError(problem)
  return LanguageModel(
    build_transformer(config, vocab_size, mesh),
    moe.aux_weight,
    moe.balance,
    token_bytes,
    z_weight=moe.z_weight,
    entropy_weight=moe.entropy_weight,
    confidence_weight=config.confidence_weight,
    bias_rate=getattr(router, 'bias_rate', 0.0),
    watched=watched,
    logits_chunk=config.model.logits_chunk,
    num_tokens=vocab_size if config.model.vocab_rows else None,
  )


def _num_chars(utf8: bytes) -> int:
  """Returns the number of characters that begin in `utf8`.

  Every byte but 0b10xxxxxx begins one.
  """
  return sum(byte & 0xC0 != 0x80 for byte in utf8)


def _sum_of(
  sizes: Float[np.ndarray, ' vocab'] | None,
  targets: Int[Array, 'batch time'],
  weights: Float[Array, 'batch time'],
) -> Float[Array, '']:
  """Returns the weighted sum of the targets' sizes; None for sizes of 1."""
  size = 1.0 if sizes is None else jnp.asarray(sizes)[targets]
  return jnp.sum(size * weights)
