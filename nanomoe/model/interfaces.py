"""Interfaces of a model's exchangeable parts, and of their factories.

A factory makes a part inside the module that uses the part, as Linen requires.
Most factories are `functools.partial` of a module's class.
"""

from collections.abc import Callable
import inspect
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.model.convolution import ShortConvolution
from nanomoe.model.ngrams import Ngrams
from nanomoe.moe.layer import MoEAux
from nanomoe.moe.routing import RouterInputs

# Function from the last activations to logits. It is no module, so that it can
# be called in a loop of JAX.
Head = Callable[
  [Float[Array, 'batch time d_model']], Float[Array, 'batch time vocab']
]


class AttentionInputs(NamedTuple):
  """Everything that an attention may use beside the activations.

  Attributes:
    cache: Decode cache that the attention returned for the tokens before x;
      None if x is the beginning of a window.
    start: Position of the first token of x, `int32[batch]`; None if x is the
      beginning of a window.
    length: Number of tokens in each sequence of x, `int32[batch]`, after which
      there is padding; None if there is no padding. Later tokens must not
      attend to padding.
  """

  cache: Any = None
  start: Int[Array, ' batch'] | None = None
  length: Int[Array, ' batch'] | None = None

  def positions(self, time: int) -> Int[Array, '#batch {time}']:
    """Returns the positions of `time` tokens from `start` on.

    Their shape is `[batch, time]`, or `[1, time]` if `start` is None.
    """
    start = 0 if self.start is None else self.start[:, None]
    return jnp.atleast_2d(start + jnp.arange(time))


@runtime_checkable
class Attention(Protocol):
  """Module that mixes the tokens of a sequence.

  Its class attribute `causal` says whether the output of a token is independent
  of later tokens. A class without the attribute counts as causal.
  """

  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: AttentionInputs,
    /,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], Any]:
    """Returns the output, and the decode cache for the tokens after x.

    Args:
      x: Activations: a whole window without a cache, else the next token of
        each sequence.
      inputs: Decode cache and positions.
      train: Whether the attention is training.

    Returns:
      The output, and a pytree of arrays, `[batch, ...]` each. Only the
      attention knows the structure of its cache. The structure and shapes must
      be the same with and without a cache in `inputs`.
    """
    ...


def attention_problem(attention: object) -> str:
  """Returns why `attention` cannot be called as an attention, or ''."""
  if not isinstance(attention, nn.Module):
    return f'made a {type(attention).__name__}; it must be a Linen module'
  try:
    inspect.signature(attention).bind(None, None, train=True)
  except TypeError:
    return (
      f'{type(attention).__name__}.__call__ must take (self, x, inputs, *, '
      'train), where inputs has cache, start and length'
    )
  return ''


@runtime_checkable
class FeedForwardLayer(Protocol):
  """Module that transforms each token by itself: a dense one, or experts."""

  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    inputs: RouterInputs,
    /,
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux | None]:
    """Returns the output, and the report on its routing if it has experts."""
    ...


@runtime_checkable
class NormFactory(Protocol):
  """Factory of a normalization along the last axis."""

  def __call__(self, *, name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns the normalization whose parameters have this name."""
    ...


@runtime_checkable
class ConvolutionFactory(Protocol):
  """Factory of a convolution over time."""

  def __call__(self, *, name: str) -> ShortConvolution:
    """Returns the convolution whose parameters have this name."""
    ...


@runtime_checkable
class AttentionFactory(Protocol):
  """Factory of a block's attention, whose parameters are `attention`."""

  def __call__(self) -> Attention:
    """Returns the attention."""
    ...


@runtime_checkable
class FeedForwardFactory(Protocol):
  """Factory of a block's feed-forward layer, with a name of its own."""

  def __call__(self) -> FeedForwardLayer:
    """Returns the layer."""
    ...


@runtime_checkable
class NgramsFactory(Protocol):
  """Factory of the embeddings of n-grams."""

  def __call__(self, *, name: str) -> Ngrams:
    """Returns the module whose parameters have this name."""
    ...


@runtime_checkable
class HeadFactory(Protocol):
  """Factory of the layer that makes logits, whose parameters are `head`."""

  def __call__(self, embedding: Float[Array, 'vocab d_model'], /) -> Head:
    """Returns the head of a model with these token embeddings."""
    ...
