"""Position encodings: how a model knows where in a window a token is."""

from collections.abc import Callable
import dataclasses

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Base of the rotation angles. The slowest pair turns by about 1 / THETA radians
# from a position to the next.
THETA = 10_000.0


class Position:
  """Position encoding that changes nothing, and the base class of others."""

  def embed(
    self,
    param: Callable[..., Array],
    x: Float[Array, 'batch time d_model'],
    start: Int[Array, ' batch'] | None,
  ) -> Float[Array, 'batch time d_model']:
    """Returns the activations that enter the first block.

    Args:
      param: `nn.Module.param` of the transformer.
      x: Token embeddings.
      start: Position of the first token in each sequence; None for 0.
    """
    del param, start
    return x

  def rotate(
    self,
    x: Float[Array, 'batch heads time d_head'],
    position: Int[Array, '#batch time'],
  ) -> Float[Array, 'batch heads time d_head']:
    """Returns queries, or keys, as an attention compares them.

    Args:
      x: Queries or keys.
      position: Position of each of them.
    """
    del position
    return x


@dataclasses.dataclass(frozen=True)
class Learned(Position):
  """Learned embedding of each position of a window. Gehring et al. 2017.

  Attributes:
    block_size: Number of positions.
  """

  block_size: int

  def embed(self, param, x, start):
    """Returns the token embeddings plus the position embeddings."""
    shape = self.block_size, x.shape[-1]
    table = param('position_embedding', nn.initializers.normal(0.02), shape)
    if start is None:
      return x + table[: x.shape[1]]
    return x + table[start[:, None] + jnp.arange(x.shape[1])]


class Rope(Position):
  """Rotary position encoding. Su et al. 2021, eq. 34.

  Pairs of elements are rotated by angles that are proportional to the position.
  Products of queries and keys then depend on their distance alone. Element i is
  paired with element i + d_head / 2, as in Llama, Mixtral and Qwen.
  """

  def rotate(self, x, position):
    """Returns x, rotated by the angles of its positions."""
    half = x.shape[-1] // 2
    # [batch or 1, 1, time, half]
    angle = position[:, None, :, None] * THETA ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# Position encodings by the value of `model.position`, as functions of the block
# size.
POSITIONS = {'learned': Learned, 'rope': lambda block_size: Rope()}
