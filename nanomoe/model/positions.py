"""How a model knows where in a window a token is."""

from collections.abc import Callable
import dataclasses

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

THETA = 10_000.0  # The slowest pair turns by about 1 / THETA at a step.


class Position:
  """What becomes of embeddings, and of queries and keys: here, nothing."""

  def embed(
    self,
    param: Callable[..., Array],
    x: Float[Array, 'batch time d_model'],
    start: Int[Array, ' batch'] | None,
  ) -> Float[Array, 'batch time d_model']:
    """What enters the first block.

    Args:
      param: nn.Module.param of the transformer.
      x: the tokens' embeddings.
      start: the position of the first token; None: 0.
    """
    del param, start
    return x

  def rotate(
    self,
    x: Float[Array, 'batch heads time d_head'],
    position: Int[Array, '#batch time'],
  ) -> Float[Array, 'batch heads time d_head']:
    """Queries, or keys, as attention compares them; a cache holds the keys."""
    del position
    return x


@dataclasses.dataclass(frozen=True)
class Learned(Position):
  """An embedding for each position of a window. Gehring et al. 2017."""

  block_size: int

  def embed(self, param, x, start):
    shape = self.block_size, x.shape[-1]
    table = param('position_embedding', nn.initializers.normal(0.02), shape)
    if start is None:
      return x + table[: x.shape[1]]
    return x + table[start[:, None] + jnp.arange(x.shape[1])]


class Rope(Position):
  """Turns pairs of elements by angles that grow with the position.

  Products of queries and keys then depend on their distance alone. Su et al.
  2021, eq. 34; element i is paired with i + d_head / 2, as in Llama, Mixtral
  and Qwen.
  """

  def rotate(self, x, position):
    half = x.shape[-1] // 2
    angle = position[:, None, :, None] * THETA ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# Each makes, of block_size, a Position.
POSITIONS = {'learned': Learned, 'rope': lambda _: Rope()}
