"""Causal self-attention, and its decode cache of keys and values.

`nanomoe.model.interfaces.Attention` says what an attention must do. Others can
be added outside this package: `model.attention.type` takes an import path.
"""

from typing import ClassVar, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.model.interfaces import AttentionInputs, NormFactory
from nanomoe.model.linear import Linear
from nanomoe.model.positions import Position
from nanomoe.ops.causal_blocks import attend_by_blocks
from nanomoe.ops.dropout import dropout
from nanomoe.ops.matmul import einsum

XAVIER = nn.initializers.xavier_uniform()


class KVCache(NamedTuple):
  """Decode cache of keys and values.

  Attributes:
    key: Keys by position, after normalization and rotation.
    value: Values by position.
  """

  key: Float[Array, 'batch kv_heads positions d_head']
  value: Float[Array, 'batch kv_heads positions d_head']


def attend(
  q: Float[Array, 'batch heads rows d_head'],
  k: Float[Array, 'batch heads positions d_head'],
  v: Float[Array, 'batch heads positions d_head'],
  start: int | Int[Array, 'batch 1'],
  key: jax.Array | None = None,
  *,
  dropout_rate: float = 0.0,
  precision: str,
) -> Float[Array, 'batch heads rows d_head']:
  """Returns `softmax(q k^T / sqrt(d_head)) v` with a causal mask.

  Vaswani et al. 2017, eq. 1. A row attends to its own position and to all
  positions before it.

  Args:
    q: Queries of consecutive positions.
    k: Keys of the positions from 0.
    v: Values of the same positions.
    start: Position of the first row of q, the same for all sequences or one
      for each.
    key: Random key of the dropout; None disables it.
    dropout_rate: Dropout rate of the attention weights, from 0 to 1.
    precision: Precision of the matrix products.
  """
  # [batch, heads, rows, positions]
  scores = einsum('bhtd,bhsd->bhts', q * q.shape[-1] ** -0.5, k, precision)
  row = jnp.atleast_2d(start + jnp.arange(q.shape[2]))  # [1 or batch, rows]
  visible = jnp.arange(k.shape[2]) <= row[:, None, :, None]
  # JAX_DEBUG_INFS must not find the infinities of this mask.
  with jax.debug_infs(False):
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
  if key is not None:
    weights = dropout(weights, key, dropout_rate)
  return einsum('bhts,bhsd->bhtd', weights, v, precision)


class CausalSelfAttention(nn.Module):
  """Causal multi-head self-attention with grouped queries.

  Vaswani et al. 2017, sec. 3.2, with dropout of the attention weights; Ainslie
  et al. 2023 for grouped queries; Henry et al. 2020 for normalized queries and
  keys.

  Attributes:
    num_heads: Number of query heads.
    num_kv_heads: Number of key and value heads. Each serves `num_heads /
      num_kv_heads` consecutive query heads.
    norm: Factory of the normalization of each head's queries, and of its keys.
    position: Position encoding, which rotates queries and keys.
    use_bias: Whether the linear layers have biases.
    dropout_rate: Dropout rate of the attention weights.
    precision: Precision of the matrix products.
    out_init: Initializer of the output layer's kernel.
  """

  num_heads: int
  num_kv_heads: int
  norm: NormFactory
  position: Position
  use_bias: bool
  dropout_rate: float
  precision: str
  out_init: nn.initializers.Initializer
  causal: ClassVar[bool] = True

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: AttentionInputs,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], KVCache]:
    """Returns the attention's output and its decode cache.

    Args:
      x: Activations. With a cache, they follow the tokens in the cache, which
        must have room for them.
      inputs: Decode cache and position.
      train: Whether attention weights are dropped.
    """
    time, d_model = x.shape[1:]
    q, k, v = self._project(x)  # [batch, heads or kv_heads, time, d_head]
    q, k = self.norm(name='q_norm')(q), self.norm(name='k_norm')(k)
    positions = inputs.positions(time)  # [1 or batch, time]
    q = self.position.rotate(q, positions)
    k = self.position.rotate(k, positions)
    if inputs.cache is None:
      cache = KVCache(k, v)
      drops = train and self.dropout_rate > 0
      y = attend_by_blocks(
        attend,
        q,
        self._repeat_heads(k),
        self._repeat_heads(v),
        self.make_rng('dropout') if drops else None,
        dropout_rate=self.dropout_rate,
        precision=self.precision,
      )
    else:
      # [batch, kv_heads, positions, d_head]
      cache = KVCache(
        _write(inputs.cache.key, k, positions[:, 0]),
        _write(inputs.cache.value, v, positions[:, 0]),
      )
      y = attend(
        q,
        self._repeat_heads(cache.key),
        self._repeat_heads(cache.value),
        positions[:, :1],
        precision=self.precision,
      )
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)  # [batch, time, d_model]
    return self._linear(d_model, 'out', self.out_init)(y), cache

  def _project(self, x):
    """Returns queries, keys and values by head.

    The features of the projection are ordered by group: the queries that share
    a key and a value, then these two. A tensor axis that divides the groups
    divides all three alike.
    """
    batch, time, d_model = x.shape
    d_head = d_model // self.num_heads
    size = self.num_heads // self.num_kv_heads  # Queries in a group.
    features = self.num_kv_heads * (size + 2) * d_head
    qkv = self._linear(features, 'qkv', XAVIER)(x)
    qkv = qkv.reshape(batch, time, self.num_kv_heads, size + 2, d_head)
    qkv = qkv.transpose(0, 2, 3, 1, 4)  # [batch, groups, _, time, d_head]
    q = qkv[:, :, :size].reshape(batch, self.num_heads, time, d_head)
    return q, qkv[:, :, size], qkv[:, :, size + 1]

  def _linear(self, features: int, name: str, init) -> Linear:
    return Linear(features, init, self.use_bias, self.precision, name=name)

  def _repeat_heads(self, x):
    """Returns the keys, or values, that each query head reads."""
    return jnp.repeat(x, self.num_heads // self.num_kv_heads, axis=1)


def _write(
  old: Float[Array, 'batch kv_heads positions d_head'],
  new: Float[Array, 'batch kv_heads time d_head'],
  start: Int[Array, ' batch'],
) -> Float[Array, 'batch kv_heads positions d_head']:
  """Returns `old` with `new` written from position `start` of each sequence."""
  return jax.vmap(
    lambda o, n, s: jax.lax.dynamic_update_slice(o, n, (0, s, 0))
  )(old, new, start)


# Attentions by name.
ATTENTIONS = {'CausalSelfAttention': CausalSelfAttention}
