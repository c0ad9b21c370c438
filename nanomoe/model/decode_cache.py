"""Decode cache of a model: what it keeps of earlier tokens."""

from typing import Any, NamedTuple

from jaxtyping import Array, Int

from nanomoe.model.convolution import ConvCache


class BlockCache(NamedTuple):
  """Decode cache of a block.

  Attributes:
    attention: Cache of the block's attention, which alone knows its structure.
    convolutions: Caches of the convolutions before the attention and before the
      feed-forward layer.
  """

  attention: Any
  convolutions: tuple[ConvCache, ConvCache]


class DecodeCache(NamedTuple):
  """Decode cache of a model.

  Attributes:
    tokens: Token ids by position. Those from position `length` on are padding.
    length: Number of tokens in each sequence.
    blocks: Caches of the blocks, first block first. Blocks of a scan have one
      entry for each block of a period, whose arrays have a leading axis of
      periods; in training they have none.
  """

  tokens: Int[Array, 'batch positions']
  length: Int[Array, ' batch']
  blocks: tuple[BlockCache, ...]
