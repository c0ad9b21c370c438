"""Causal self-attention and the cache of what it has seen."""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.dropout import dropout
from nanomoe.linear import Linear
from nanomoe.numerics import dot
from nanomoe.positions import Position

PARTS = 4  # Of a window's rows, in attention.
XAVIER = nn.initializers.xavier_uniform()


class Cache(NamedTuple):
  """What later tokens need of earlier ones; with a first axis L, of all layers.

  Attributes:
    key, value: by position; what stands at `length` and after is never seen.
    length: positions that hold a token, by sequence.
  """

  key: Float[Array, '*L batch kv_heads positions d_head']
  value: Float[Array, '*L batch kv_heads positions d_head']
  length: Int[Array, '*L batch']


class Attention(nn.Module):
  """Causal multi-head self-attention. Vaswani et al. 2017, sec. 3.2.

  Dropout on the attention weights, as there. With a cache, x continues what
  is in it, and no more than fits.

  Attributes:
    num_heads: of queries.
    num_kv_heads: of keys and values, each for as many heads of queries, one
      after the other: grouped-query attention. Ainslie et al. 2023.
    norm: makes, of a name, what normalizes each head's queries, or keys.
      Henry et al. 2020.
    position: rotates them.
    use_bias: of the linear layers.
    dropout_rate: of the attention weights.
    precision: of matrix products.
    out_init: of the last layer's weights.
  """

  num_heads: int
  num_kv_heads: int
  norm: Callable[..., Callable]
  position: Position
  use_bias: bool
  dropout_rate: float
  precision: str
  out_init: nn.initializers.Initializer = XAVIER

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    cache: Cache | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], Cache]:
    batch, time, d_model = x.shape
    q, k, v = self._qkv(x)
    start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    q, k = self.norm(name='q_norm')(q), self.norm(name='k_norm')(k)
    # Without a cache, one row for the whole batch.
    position = (0 if cache is None else start[:, None]) + jnp.arange(time)
    rotate = self.position.rotate
    q, k = (rotate(x, jnp.atleast_2d(position)) for x in (q, k))
    if cache is None:
      drops = train and self.dropout_rate > 0
      key = self.make_rng('dropout') if drops else None
      y = _attend_in_parts(
        q,
        self._shared(k),
        self._shared(v),
        key,
        dropout_rate=self.dropout_rate,
        precision=self.precision,
      )
    else:
      k, v = _write(cache.key, k, start), _write(cache.value, v, start)
      weights = _weights(q, self._shared(k), start[:, None], self.precision)
      y = _read(weights, self._shared(v), self.precision)
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)
    out = self._linear(d_model, 'out', self.out_init)
    return out(y), Cache(k, v, start + time)

  def _qkv(self, x):
    """Queries, keys and values: [batch, heads or kv_heads, time, d_head]."""
    d_head = x.shape[-1] // self.num_heads
    heads = self.num_heads + 2 * self.num_kv_heads
    qkv = self._linear(heads * d_head, 'qkv', XAVIER)(x)
    qkv = qkv.reshape(*x.shape[:-1], heads, d_head).transpose(0, 2, 1, 3)
    first = self.num_heads, self.num_heads + self.num_kv_heads
    return jnp.split(qkv, first, axis=1)

  def _linear(self, features: int, name: str, init) -> Linear:
    return Linear(features, init, self.use_bias, self.precision, name=name)

  def _shared(self, x):
    """The keys, or values, of each head of queries."""
    return jnp.repeat(x, self.num_heads // self.num_kv_heads, axis=1)


# By itself: traced for one layer, not for each.
@functools.partial(jax.jit, static_argnames=('dropout_rate', 'precision'))
def _attend_in_parts(
  q: Float[Array, 'batch heads time d_head'],
  k: Float[Array, 'batch heads time d_head'],
  v: Float[Array, 'batch heads time d_head'],
  key: jax.Array | None,
  *,
  dropout_rate: float,
  precision: str,
) -> Float[Array, 'batch heads time d_head']:
  """A few rows at a time, each with the positions that its last one sees.

  With 4 parts, 5 eighths of the scores are computed; half of them are seen.

  Args:
    q, k, v: of the same positions.
    key: of the dropout of attention weights; None: there is none.
    dropout_rate: of it.
    precision: of products.
  """
  time = q.shape[2]
  size = -(-time // PARTS)
  parts = [slice(i, min(i + size, time)) for i in range(0, time, size)]
  stops = tuple(p.stop for p in parts)
  each = []
  for p, seen, values in zip(
    parts, _prefixes(k, stops), _prefixes(v, stops), strict=True
  ):
    weights = _weights(q[:, :, p], seen, p.start, precision)
    if key is not None:
      own = jax.random.fold_in(key, p.start)
      weights = dropout(weights, own, dropout_rate)
    each.append(_read(weights, values, precision))
  return jnp.concatenate(each, axis=2)


def _weights(
  q: Float[Array, 'batch heads rows d_head'],
  k: Float[Array, 'batch heads positions d_head'],
  start: int | Int[Array, 'batch 1'],
  precision: str,
) -> Float[Array, 'batch heads rows positions']:
  """Of the positions up to a row's own; `start` is the first row's."""
  scores = dot('bhtd,bhsd->bhts', q * q.shape[-1] ** -0.5, k, precision)
  # [batch or 1, 1, rows, positions].
  own = jnp.atleast_2d(start + jnp.arange(q.shape[2]))
  visible = jnp.arange(k.shape[2]) <= own[:, None, :, None]
  with jax.debug_infs(False):  # JAX_DEBUG_INFS is not about this mask.
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))


def _read(weights, v, precision: str):
  return dot('bhts,bhsd->bhtd', weights, v, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _prefixes(
  x: Float[Array, 'batch heads time d_head'], stops: tuple[int, ...]
) -> tuple[Float[Array, 'batch heads _ d_head'], ...]:
  """x[:, :, :stop] for each; the last stop is the end.

  The gradient is added up in place. Of slices XLA would pad each gradient and
  add them up wherever it reads them, element by element.
  """
  return tuple(x[:, :, :stop] for stop in stops)


def _prefixes_forward(x, stops):
  return _prefixes(x, stops), None


def _prefixes_backward(stops, _, gs):
  *others, total = gs
  for g, stop in zip(others, stops[:-1], strict=True):
    total = jax.lax.dynamic_update_slice(
      total, total[:, :, :stop] + g, (0, 0, 0, 0)
    )
  return (total,)


_prefixes.defvjp(_prefixes_forward, _prefixes_backward)


def _write(
  old: Float[Array, 'batch kv_heads positions d_head'],
  new: Float[Array, 'batch kv_heads time d_head'],
  start: Int[Array, ' batch'],
) -> Float[Array, 'batch kv_heads positions d_head']:
  """`old` with `new` from each sequence's own `start` on."""
  return jax.vmap(
    lambda o, n, s: jax.lax.dynamic_update_slice(o, n, (0, s, 0))
  )(old, new, start)
