"""The transformer around the experts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe.model.attention import AttentionCache
from nanomoe.model.convolution import ConvCache
from nanomoe.model.positions import Position
from nanomoe.moe.layer import MoEAux
from nanomoe.moe.routing import RouterInputs
from nanomoe.ops.dropout import Dropout
from nanomoe.ops.remat import remat


class BlockCache(NamedTuple):
  """What a block keeps of earlier tokens; `DecodeCache` has all: [L, ...].

  Attributes:
    attention: of its attention.
    inputs: of the convolutions before attention and before the feed-forward
      layer, by position; None where there is none.
  """

  attention: AttentionCache
  inputs: tuple[ConvCache, ConvCache]


class DecodeCache(NamedTuple):
  """What later tokens need of earlier ones.

  Attributes:
    tokens: by position; what stands at `length` and after is never seen.
    layers: of all blocks, [L, ...].
  """

  tokens: Int[Array, 'batch positions']
  layers: BlockCache

  @property
  def length(self) -> Int[Array, ' batch']:
    """Positions that hold a token, by sequence."""
    return self.layers.attention.length[0]

  def cut(self, length: Int[Array, ' batch']) -> 'DecodeCache':
    """No more of it than that."""
    attention = self.layers.attention
    every_layer = jnp.broadcast_to(length, attention.length.shape)
    attention = attention._replace(length=every_layer)
    return self._replace(layers=self.layers._replace(attention=attention))


class Block(nn.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)).

  Each with a convolution behind its norm.

  Attributes:
    norm: makes, of a name, a module x -> x.
    convolution: makes, of a name, a module (x, inputs before, position of the
      first) -> (x, inputs).
    attention: makes a module (x, cache, train) -> (y, cache).
    feed_forward: makes a module (x, given, train) -> (y, what it reports,
      or None).
    dropout_rate: on both branches.
  """

  norm: Callable[..., nn.Module]
  convolution: Callable[..., nn.Module]
  attention: Callable[[], nn.Module]
  feed_forward: Callable[[], nn.Module]
  dropout_rate: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    given: RouterInputs,
    past: BlockCache | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux | None, BlockCache]:
    cache, (first, second) = past or (None, (None, None))
    start = jnp.zeros(len(x), jnp.int32) if cache is None else cache.length
    normed = self.norm(name='attention_norm')(x)
    convolve = self.convolution(name='attention_convolution')
    normed, first = convolve(normed, first, start)
    y, cache = self.attention()(normed, cache, train=train)
    x = x + Dropout(self.dropout_rate)(y, train=train)
    normed = self.norm(name='feed_forward_norm')(x)
    convolve = self.convolution(name='feed_forward_convolution')
    normed, second = convolve(normed, second, start)
    y, aux = self.feed_forward()(normed, given, train=train)
    x = x + Dropout(self.dropout_rate)(y, train=train)
    return x, aux, BlockCache(cache, (first, second))


class Transformer(nn.Module):
  """Tokens -> logits of the next token.

  Attributes:
    vocab_size: V.
    d_model: width of the residual stream.
    dropout_rate: on the sum of embeddings.
    remat: keeps only what enters a block, and computes the rest again for the
      gradient: a third more work, a fraction of the activations' memory.
    ngrams: makes a module (x, all tokens, position of the first) -> x.
    position: of a token, added to its embedding or not.
    blocks: each makes, of a name, a layer: a module (x, given, past, train)
      -> (x, what it reports, or None, past).
    norm: makes, of a name, a module x -> x.
    head: makes, of the tokens' embeddings [V, d_model], x -> logits.
    cap: logits -> logits.
  """

  vocab_size: int
  d_model: int
  dropout_rate: float
  remat: bool
  ngrams: Callable[..., nn.Module]
  position: Position
  blocks: Sequence[Callable[..., nn.Module]]
  norm: Callable[..., nn.Module]
  head: Callable[[jax.Array], Callable]
  cap: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'batch time'],
    mask: Bool[Array, 'batch time'],
    past: DecodeCache | None = None,
    bias: Float[Array, 'layers experts'] | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time vocab'], MoEAux | None, DecodeCache]:
    """Returns logits, the layers' reports, stacked: [L, ...], and the past.

    Reports are of the layers that make one, None if none does.

    Args:
      tokens: from position 0 on; with a past, from its length on.
      mask: False for padding, which counts in no load and no loss.
      past: the positions before, as returned.
      bias: of the layers' routers, for those that have one.
      train: with dropout.
    """
    embedding = self.param(
      'token_embedding',
      nn.initializers.normal(0.02),
      (self.vocab_size, self.d_model),
    )
    start = None if past is None else past.length
    seen = tokens if past is None else _write(past, tokens)
    first = jnp.zeros(len(tokens), jnp.int32) if start is None else start
    x = self.ngrams(name='ngrams')(embedding[tokens], seen, first)
    x = self.position.embed(self.param, x, start)
    x = Dropout(self.dropout_rate)(x, train=train)

    def run(block, x, given, own):
      return block(x, given, own, train=train)

    if self.remat and train:
      run = remat(run)
    reports, layers = [], []
    for i, block in enumerate(self.blocks):
      own = past and jax.tree.map(lambda c, i=i: c[i], past.layers)
      # Of the layers that report: others ignore it.
      its = None if bias is None else bias[min(len(reports), len(bias) - 1)]
      given = RouterInputs(tokens, mask, its)
      x, aux, grown = run(block(name=f'block_{i}'), x, given, own)
      reports += [] if aux is None else [aux]
      layers.append(grown)
    x = self.norm(name='final_norm')(x)
    logits = self.cap(self.head(embedding)(x))
    reported = _stack(reports) if reports else None
    return logits, reported, DecodeCache(seen, _stack(layers))


def _write(
  past: DecodeCache, tokens: Int[Array, 'batch time']
) -> Int[Array, 'batch positions']:
  write = jax.vmap(jax.lax.dynamic_update_slice)
  return write(past.tokens, tokens, past.length[:, None])


def _stack(trees):
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)
