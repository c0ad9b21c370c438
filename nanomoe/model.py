"""The transformer around the experts."""

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe.dropout import Dropout
from nanomoe.moe import MoEAux
from nanomoe.numerics import dot
from nanomoe.remat import remat
from nanomoe.routing import Given

LAYER_NORM_EPSILON = 1e-6
PARTS = 4  # Of a window's rows, in attention.


class Linear(nn.Module):
  """x @ kernel + bias."""

  features: int
  kernel_init: nn.initializers.Initializer
  precision: str

  @nn.compact
  def __call__(self, x: Float[Array, '*rows d_in']) -> Float[Array, '*rows d']:
    shape = x.shape[-1], self.features
    kernel = self.param('kernel', self.kernel_init, shape)
    bias = self.param('bias', nn.initializers.zeros_init(), shape[1:])
    rows = x.reshape(-1, x.shape[-1])
    y = dot('nd,df->nf', rows, kernel, self.precision, bias)
    return y.reshape(*x.shape[:-1], self.features)


class Cache(NamedTuple):
  """What later tokens need of earlier ones; with a first axis L, of all layers.

  Attributes:
    key, value: by position; what stands at `length` and after is never seen.
    length: positions that hold a token, by sequence.
  """

  key: Float[Array, '*L batch heads positions d_head']
  value: Float[Array, '*L batch heads positions d_head']
  length: Int[Array, '*L batch']


class Attention(nn.Module):
  """Causal multi-head self-attention. Vaswani et al. 2017, sec. 3.2.

  Dropout on the attention weights, as there. With a cache, x continues what
  is in it, and no more than fits.
  """

  num_heads: int
  dropout_rate: float
  precision: str

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    cache: Cache | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], Cache]:
    batch, time, d_model = x.shape
    init = nn.initializers.xavier_uniform()
    qkv = Linear(3 * d_model, init, self.precision, name='qkv')(x)
    # [batch, time, 3, heads, d_head] -> 3 x [batch, heads, time, d_head].
    qkv = qkv.reshape(batch, time, 3, self.num_heads, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    if cache is None:
      start = jnp.zeros(batch, jnp.int32)
      y = self._attend_in_parts(q, k, v, train)
    else:
      start = cache.length
      k, v = _write(cache.key, k, start), _write(cache.value, v, start)
      y = self._attend(q, k, v, start[:, None], train)
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)
    y = Linear(d_model, init, self.precision, name='out')(y)
    return y, Cache(k, v, start + time)

  def _attend_in_parts(self, q, k, v, train: bool):
    """A few rows at a time, each with the positions that its last one sees.

    With 4 parts, 5 eighths of the scores are computed; half of them are seen.
    """
    time = q.shape[2]
    size = -(-time // PARTS)
    parts = [slice(i, min(i + size, time)) for i in range(0, time, size)]
    each = [
      self._attend(
        q[:, :, p], k[:, :, : p.stop], v[:, :, : p.stop], p.start, train
      )
      for p in parts
    ]
    return jnp.concatenate(each, axis=2)

  def _attend(self, q, k, v, start, train: bool):
    """q [batch, heads, rows, d_head] of k and v [batch, heads, positions, ...].

    Args:
      q, k, v: as above.
      start: the position of the first row: int, or int[batch, 1].
      train: with dropout.
    """
    scores = dot('bhtd,bhsd->bhts', q * q.shape[-1] ** -0.5, k, self.precision)
    # A row sees the positions up to its own: [batch or 1, 1, time, positions].
    own = jnp.atleast_2d(start + jnp.arange(q.shape[2]))
    visible = jnp.arange(k.shape[2]) <= own[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
    weights = Dropout(self.dropout_rate)(weights, train=train)
    return dot('bhts,bhsd->bhtd', weights, v, self.precision)


def _write(
  old: Float[Array, 'batch heads positions d_head'],
  new: Float[Array, 'batch heads time d_head'],
  start: Int[Array, ' batch'],
) -> Float[Array, 'batch heads positions d_head']:
  """`old` with `new` from each sequence's own `start` on."""
  return jax.vmap(
    lambda o, n, s: jax.lax.dynamic_update_slice(o, n, (0, s, 0))
  )(old, new, start)


class Block(nn.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)).

  Attributes:
    attention: makes a module (x, cache, train) -> (y, cache).
    feed_forward: makes a module (x, given, train) -> (y, what it reports).
    dropout_rate: on both branches.
  """

  attention: Callable[[], nn.Module]
  feed_forward: Callable[[], nn.Module]
  dropout_rate: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    given: Given,
    cache: Cache | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux, Cache]:
    y, grown = self.attention()(_norm('attention_norm')(x), cache, train=train)
    x = x + Dropout(self.dropout_rate)(y, train=train)
    y = _norm('feed_forward_norm')(x)
    y, aux = self.feed_forward()(y, given, train=train)
    return x + Dropout(self.dropout_rate)(y, train=train), aux, grown


class Transformer(nn.Module):
  """Tokens -> logits of the next token, with learned absolute positions.

  Attributes:
    vocab_size: V.
    block_size: the longest input.
    d_model: width of the residual stream.
    num_layers: L.
    dropout_rate: on the sum of embeddings.
    remat: keeps only what enters a block, and computes the rest again for the
      gradient: a third more work, a fraction of the activations' memory.
    block: makes a module (x, given, cache, train) -> (x, what it reports,
      cache).
    precision: of matrix products.
  """

  vocab_size: int
  block_size: int
  d_model: int
  num_layers: int
  dropout_rate: float
  remat: bool
  block: Callable[..., nn.Module]
  precision: str

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'batch time'],
    mask: Bool[Array, 'batch time'],
    cache: Cache | None = None,
    bias: Float[Array, 'layers experts'] | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time vocab'], MoEAux, Cache]:
    """Returns logits, and the layers' reports and caches, stacked: [L, ...].

    Args:
      tokens: from position 0 on; with a cache, from its length on.
      mask: False for padding, which counts in no load and no loss.
      cache: of the positions before, as returned: [L, ...].
      bias: of the layers' routers, for those that have one.
      train: with dropout.
    """
    small = nn.initializers.normal(0.02)
    embedding = self.param(
      'token_embedding', small, (self.vocab_size, self.d_model)
    )
    positions = self.param(
      'position_embedding', small, (self.block_size, self.d_model)
    )
    x = embedding[tokens]
    if cache is None:
      x += positions[: tokens.shape[1]]
    else:
      x += positions[cache.length[0][:, None] + jnp.arange(tokens.shape[1])]
    x = Dropout(self.dropout_rate)(x, train=train)

    def run(block, x, given, own):
      return block(x, given, own, train=train)

    if self.remat and train:
      run = remat(run)
    layers = []
    for i in range(self.num_layers):
      own = cache and jax.tree.map(lambda c, i=i: c[i], cache)
      given = Given(tokens, mask, None if bias is None else bias[i])
      x, *report = run(self.block(name=f'block_{i}'), x, given, own)
      layers.append(report)
    x = _norm('final_norm')(x)
    logits = Linear(self.vocab_size, small, self.precision, name='head')(x)
    aux, grown = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return logits, aux, grown


def _norm(name: str) -> nn.Module:
  return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name=name)
