"""The transformer around the experts."""

from collections.abc import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe.dropout import Dropout
from nanomoe.moe import MoEAux
from nanomoe.numerics import dot

LAYER_NORM_EPSILON = 1e-6


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
    y = dot('nd,df->nf', rows, kernel, self.precision) + bias
    return y.reshape(*x.shape[:-1], self.features)


class Attention(nn.Module):
  """Causal multi-head self-attention. Vaswani et al. 2017, sec. 3.2.

  Dropout on the attention weights, as there.
  """

  num_heads: int
  dropout_rate: float
  precision: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'batch time d_model'], *, train: bool
  ) -> Float[Array, 'batch time d_model']:
    batch, time, d_model = x.shape
    init = nn.initializers.xavier_uniform()
    qkv = Linear(3 * d_model, init, self.precision, name='qkv')(x)
    # [batch, time, 3, heads, d_head] -> 3 x [batch, heads, time, d_head].
    qkv = qkv.reshape(batch, time, 3, self.num_heads, -1)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = dot('bhtd,bhsd->bhts', q * q.shape[-1] ** -0.5, k, self.precision)
    causal = jnp.tril(jnp.ones((time, time), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    weights = Dropout(self.dropout_rate)(weights, train=train)
    y = dot('bhts,bhsd->bhtd', weights, v, self.precision)
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)
    return Linear(d_model, init, self.precision, name='out')(y)


class Block(nn.Module):
  """x + attention(norm(x)), then x + feed_forward(norm(x)).

  Attributes:
    attention: makes a module (x, train) -> y.
    feed_forward: makes a module (x, mask) -> (y, what it reports).
    dropout_rate: on both branches.
  """

  attention: Callable[[], nn.Module]
  feed_forward: Callable[[], nn.Module]
  dropout_rate: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch time d_model'],
    mask: Bool[Array, 'batch time'],
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time d_model'], MoEAux]:
    y = self.attention()(_norm('attention_norm')(x), train=train)
    x = x + Dropout(self.dropout_rate)(y, train=train)
    y, aux = self.feed_forward()(_norm('feed_forward_norm')(x), mask)
    return x + Dropout(self.dropout_rate)(y, train=train), aux


class Transformer(nn.Module):
  """Tokens -> logits of the next token, with learned absolute positions.

  Attributes:
    vocab_size: V.
    block_size: the longest input.
    d_model: width of the residual stream.
    num_layers: L.
    dropout_rate: on the sum of embeddings.
    block: makes a module (x, mask, train) -> (x, what it reports).
    precision: of matrix products.
  """

  vocab_size: int
  block_size: int
  d_model: int
  num_layers: int
  dropout_rate: float
  block: Callable[..., nn.Module]
  precision: str

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'batch time'],
    mask: Bool[Array, 'batch time'],
    *,
    train: bool,
  ) -> tuple[Float[Array, 'batch time vocab'], MoEAux]:
    """Returns logits, and the layers' reports stacked: [L, ...].

    `mask` is False for padding, which counts in no load and no loss.
    """
    small = nn.initializers.normal(0.02)
    embedding = self.param(
      'token_embedding', small, (self.vocab_size, self.d_model)
    )
    position = self.param(
      'position_embedding', small, (self.block_size, self.d_model)
    )
    x = embedding[tokens] + position[: tokens.shape[1]]
    x = Dropout(self.dropout_rate)(x, train=train)
    layers = []
    for i in range(self.num_layers):
      x, aux = self.block(name=f'block_{i}')(x, mask, train=train)
      layers.append(aux)
    x = _norm('final_norm')(x)
    logits = Linear(self.vocab_size, small, self.precision, name='head')(x)
    return logits, jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _norm(name: str) -> nn.Module:
  return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name=name)
