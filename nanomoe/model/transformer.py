"""The transformer around the feed-forward layers, dense or of experts."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, Protocol, runtime_checkable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe.model.decode_cache import BlockCache, DecodeCache
from nanomoe.model.interfaces import (
  AttentionFactory,
  AttentionInputs,
  ConvolutionFactory,
  FeedForwardFactory,
  Head,
  HeadFactory,
  NgramsFactory,
  NormFactory,
)
from nanomoe.model.positions import Position
from nanomoe.model.stack import STACKED, block_name
from nanomoe.moe.layer import MoEAux
from nanomoe.moe.routing import RouterInputs
from nanomoe.ops.dropout import Dropout
from nanomoe.ops.remat import remat


class Block(nn.Module):
  """Pre-norm transformer block.

  `x + attention(norm(x))`, then `x + feed_forward(norm(x))`, each with a short
  convolution after its norm and dropout on its branch.

  Attributes:
    norm: Factory of the normalizations.
    convolution: Factory of the convolutions.
    attention: Factory of the attention.
    feed_forward: Factory of the feed-forward layer.
    dropout_rate: Dropout rate of both branches.
    constrain: Function that keeps the residual stream divided by rows.
    remat_attention: Whether the gradient computes the attention and what
      precedes it in its branch again, from the block's input.
  """

  norm: NormFactory
  convolution: ConvolutionFactory
  attention: AttentionFactory
  feed_forward: FeedForwardFactory
  dropout_rate: float
  constrain: Callable[[jax.Array], jax.Array]
  remat_attention: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: RouterInputs,
    cache: BlockCache | None = None,
    start: Int[Array, ' batch'] | None = None,
    length: Int[Array, ' batch'] | None = None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux | None, BlockCache]:
    """Returns the output, the report on its routing, and the decode cache.

    Args:
      x: Activations.
      inputs: Token ids, padding mask and selection bias for the router.
      cache: Decode cache of the tokens before x; None at the beginning of a
        window.
      start: Position of the first token of x in each sequence; None for 0.
      length: Number of tokens of x in each sequence before its padding; None if
        there is no padding.
      train: Whether the block is training.

    Returns:
      The output, the report of a feed-forward layer of experts or None, and the
      cache for the tokens after x.
    """
    attention_cache, conv_caches = cache or (None, (None, None))
    first = jnp.zeros(len(x), jnp.int32) if start is None else start

    def attend(block, x, attention_inputs, conv_cache, first):
      y = block.norm(name='attention_norm')(x)
      convolve = block.convolution(name='attention_convolution')
      y, conv_cache = convolve(y, conv_cache, first)
      y, cache = block.attention()(y, attention_inputs, train=train)
      return y, cache, conv_cache

    if self.remat_attention and train:
      attend = remat(attend)
    attention_inputs = AttentionInputs(attention_cache, start, length)
    y, attention_cache, attention_conv = attend(
      self, x, attention_inputs, conv_caches[0], first
    )
    x = x + Dropout(self.dropout_rate)(y, train=train)

    y = self.norm(name='feed_forward_norm')(x)
    convolve = self.convolution(name='feed_forward_convolution')
    y, feed_forward_conv = convolve(y, conv_caches[1], first)
    y, aux = self.feed_forward()(y, inputs, train=train)
    x = self.constrain(x + Dropout(self.dropout_rate)(y, train=train))
    cache = BlockCache(attention_cache, (attention_conv, feed_forward_conv))
    return x, aux, cache


@runtime_checkable
class BlockFactory(Protocol):
  """Factory of one of a transformer's blocks."""

  def __call__(self, *, name: str) -> Block:
    """Returns the block whose parameters have this name."""
    ...


class Period(nn.Module):
  """Successive blocks, which a scan runs again and again.

  Attributes:
    blocks: Factories of the blocks, first block first.
    remat_blocks: As of `Transformer`.
  """

  blocks: Sequence[BlockFactory]
  remat_blocks: bool

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    bias: Float[Array, ' experts'] | None,
    caches: tuple[BlockCache, ...] | None,
    inputs: RouterInputs,
    start: Int[Array, ' batch'] | None,
    length: Int[Array, ' batch'] | None,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], Any]:
    """Returns the output, and the report and the decode caches of the period.

    Args:
      x: Activations.
      bias: Selection bias of the period's layer of experts.
      caches: Decode caches of the blocks; None at the beginning of a window.
      inputs: Token ids and padding mask.
      start: As of `Block`.
      length: As of `Block`.
      train: Whether the model is training. No decode caches are then returned,
        because a scan would keep those of all layers.
    """
    x, reports, caches = _run(
      [block(name=block_name(i)) for i, block in enumerate(self.blocks)],
      x,
      inputs,
      None if bias is None else bias[None],
      caches,
      start,
      length,
      remat_blocks=self.remat_blocks,
      train=train,
    )
    return x, (reports[0] if reports else None, None if train else caches)


def _run(
  blocks: Sequence[Block],
  x: jax.Array,
  inputs: RouterInputs,
  bias: jax.Array | None,
  caches: Sequence[BlockCache] | None,
  start: jax.Array | None,
  length: jax.Array | None,
  *,
  remat_blocks: bool,
  train: bool,
) -> tuple[jax.Array, list[MoEAux], tuple[BlockCache, ...]]:
  """Returns the output of blocks, their reports and their decode caches."""

  def run(block, x, *args):
    return block(x, *args, train=train)

  if remat_blocks and train:
    run = remat(run)
  reports, new_caches = [], []
  for i, block in enumerate(blocks):
    # Row of the next layer of experts; a dense layer ignores it.
    row = None if bias is None else bias[min(len(reports), len(bias) - 1)]
    cache = None if caches is None else caches[i]
    x, aux, cache = run(
      block, x, inputs._replace(bias=row), cache, start, length
    )
    reports += [] if aux is None else [aux]
    new_caches.append(cache)
  return x, reports, tuple(new_caches)


class Transformer(nn.Module):
  """Decoder-only transformer, from tokens to the logits of the next tokens.

  Attributes:
    vocab_size: Number of tokens in the vocabulary, with its padding.
    d_model: Width of the residual stream.
    dropout_rate: Dropout rate of the sum of embeddings.
    remat_blocks: Whether the gradient computes each block again from the
      block's input. This costs a third more work, and activations take a
      fraction of the memory.
    ngrams: Factory of the n-gram embeddings.
    position: Position encoding.
    blocks: Factories of the blocks, first block first.
    num_unrolled: Number of blocks that are unrolled in the program. The others
      are a scan over periods, whose parameters are stacked along a leading
      axis.
    period: Number of blocks in a period of the scan.
    norm: Factory of the last normalization.
    head: Factory of the head.
    cap: Function that bounds the logits.
    constrain: Function that keeps the residual stream divided by rows.
  """

  vocab_size: int
  d_model: int
  dropout_rate: float
  remat_blocks: bool
  ngrams: NgramsFactory
  position: Position
  blocks: Sequence[BlockFactory]
  num_unrolled: int
  period: int
  norm: NormFactory
  head: HeadFactory
  cap: Callable[[jax.Array], jax.Array]
  constrain: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'batch time'],
    mask: Bool[Array, 'batch time'],
    cache: DecodeCache | None = None,
    bias: Float[Array, 'layers experts'] | None = None,
    length: Int[Array, ' batch'] | None = None,
    *,
    train: bool,
    finish: Callable[[Head, jax.Array], Any] | None = None,
  ) -> tuple[Any, MoEAux | None, DecodeCache]:
    """Returns the logits, the layers' reports and the decode cache.

    Args:
      tokens: Token ids, from position 0 on, or after those in the cache.
      mask: False for padding, which counts in no load and no loss.
      cache: Decode cache of the tokens before; None at the beginning of a
        window.
      bias: Selection biases of the routers, one row for each layer of experts.
      length: Number of tokens in each sequence, after which the decode cache
        begins again; None for all.
      train: Whether the model is training.
      finish: Function of the head and the last activations, `float[batch, time,
        d_model]`, whose result replaces the logits; None returns the logits.

    Returns:
      The logits, `float[batch, time, vocab]`, or the result of `finish`; the
      reports of all layers of experts, stacked as `[layers, ...]`, or None
      without such layers; and the cache for the tokens after.
    """
    batch, time = tokens.shape
    embedding = self.param(
      'token_embedding',
      nn.initializers.normal(0.02),
      (self.vocab_size, self.d_model),
    )
    start = None if cache is None else cache.length
    first = jnp.zeros(batch, jnp.int32) if start is None else start
    window = tokens if cache is None else _write(cache, tokens)
    x = self.ngrams(name='ngrams')(embedding[tokens], window, first)
    x = self.position.embed(self.param, x, start)
    x = Dropout(self.dropout_rate)(x, train=train)  # [batch, time, d_model]
    x = self.constrain(x)
    unrolled = self.blocks[: self.num_unrolled]
    inputs = RouterInputs(tokens, mask)
    x, reports, caches = _run(
      [block(name=block_name(i)) for i, block in enumerate(unrolled)],
      x,
      inputs,
      bias,
      None if cache is None else cache.blocks[: len(unrolled)],
      start,
      length,
      remat_blocks=self.remat_blocks,
      train=train,
    )
    aux = _stack(reports) if reports else None
    if len(unrolled) < len(self.blocks):
      in_axes: Any = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
      scan = nn.scan(
        functools.partial(Period.__call__, train=train),
        variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True, 'dropout': True, 'routing': True},
        in_axes=in_axes,
        length=(len(self.blocks) - len(unrolled)) // self.period,
      )
      blocks = self.blocks[len(unrolled) :][: self.period]
      x, (aux, stacked) = scan(
        Period(blocks, self.remat_blocks, name=STACKED),
        x,
        bias,
        None if cache is None else cache.blocks[len(unrolled) :],
        inputs,
        start,
        length,
      )
      caches += () if stacked is None else stacked
    x = self.norm(name='final_norm')(x)
    uncapped = self.head(embedding)

    def head(x):
      return self.cap(uncapped(x))

    logits = finish(head, x) if finish else head(x)
    added = time if length is None else length
    return logits, aux, DecodeCache(window, first + added, caches)


def _write(
  cache: DecodeCache, tokens: Int[Array, 'batch time']
) -> Int[Array, 'batch positions']:
  """Returns the tokens of the cache, followed by new ones."""
  write = jax.vmap(jax.lax.dynamic_update_slice)
  return write(cache.tokens, tokens, cache.length[:, None])


def _stack(trees):
  """Returns a tree of the leaves of equal trees, stacked along a new axis."""
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)
