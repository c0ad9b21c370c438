"""Routers: modules (x, tokens, mask, bias, train) -> Routing.

x is float[B, T, D], tokens int[B, T], mask bool[B, T] (False for padding), bias
float[E] or None. One with a `bias_rate` is given a bias, in model_state, that
moves by that rate after each update towards experts with less than their share.
`causal` says whether a token's experts, and their weights, are independent of
later tokens and of other sequences; tests/test_causality.py finds out.
"""

import math
from typing import ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from nanomoe import numerics
from nanomoe.routing import Routing, chosen, make_routing

Rows = Float[Array, 'batch time d_model']
Tokens = Int[Array, 'batch time']
Mask = Bool[Array, 'batch time']
Bias = Float[Array, ' experts'] | None

XAVIER = nn.initializers.xavier_uniform()


class Router(nn.Module):
  """What routers have in common.

  Attributes:
    num_experts: E.
    top_k: K.
    balance: a name in `balance.BALANCE`.
  """

  num_experts: int
  top_k: int
  balance: str

  causal: ClassVar[bool] = True

  def scores(
    self,
    x: Rows,
    name: str = 'kernel',
    init: nn.initializers.Initializer = XAVIER,
  ) -> Float[Array, 'tokens experts']:
    """x @ a parameter: the logits."""
    kernel = self.param(name, init, (x.shape[-1], self.num_experts))
    x = x.reshape(-1, x.shape[-1])
    # Always float32: a rounded logit changes the choice, not only its weight.
    return numerics.dot('nd,de->ne', x, kernel, 'float32')

  def highest(
    self, scores: Float[Array, 'tokens experts']
  ) -> Int[Array, 'tokens k']:
    """The K experts with the highest, in their order."""
    return jax.lax.top_k(jax.lax.stop_gradient(scores), self.top_k)[1]


class TopK(Router):
  """Softmax over the logits of the `top_k` highest experts; no bias, no noise.

  Shazeer et al. 2017, eq. 3 and 5, without noise. Causal: a token's experts
  depend on that token alone.
  """

  @nn.compact
  def __call__(
    self, x: Rows, tokens: Tokens, mask: Mask, bias: Bias, train: bool
  ) -> Routing:
    del tokens, bias, train
    logits = self.scores(x)
    expert = self.highest(logits)
    weight = jax.nn.softmax(chosen(logits, expert))
    probs = jax.nn.softmax(logits)
    return make_routing(expert, weight, probs, mask, self.balance, logits)


class Softmax(Router):
  """Softmax over all experts, then the `top_k` highest probabilities.

  Fedus et al. 2021 (Switch), eq. 1 and 2; Muennighoff et al. 2024 (OLMoE).
  Causal.

  Attributes:
    renormalize: weights are divided by their sum: Jiang et al. 2024 (Mixtral),
      Qwen3. It is then TopK, in another order of steps.
    jitter: in training, what the router sees is multiplied, element by element,
      by a number uniform in 1 - jitter to 1 + jitter. Switch, app. C.
  """

  renormalize: bool = False
  jitter: float = 0.0

  def __post_init__(self):
    if not 0 <= self.jitter < 1:
      raise ValueError(f'jitter={self.jitter} must be >= 0 and < 1')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Rows, tokens: Tokens, mask: Mask, bias: Bias, train: bool
  ) -> Routing:
    del tokens, bias
    if train and self.jitter:
      key, bounds = self.make_rng('routing'), (1 - self.jitter, 1 + self.jitter)
      x *= jax.random.uniform(key, x.shape, x.dtype, *bounds)
    logits = self.scores(x)
    probs = jax.nn.softmax(logits)
    expert = self.highest(probs)
    weight = chosen(probs, expert)
    if self.renormalize:
      weight /= jnp.sum(weight, axis=-1, keepdims=True)
    return make_routing(expert, weight, probs, mask, self.balance, logits)


class Sigmoid(Router):
  """Sigmoid scores; a bias, which weights do not have, selects.

  DeepSeek-AI 2024 (V3), eq. 12 to 16, and Wang et al. 2024, algorithm 1: loads
  are evened out by the bias, so moe.aux_weight may be 0. Statistics see the
  scores over their sum. Causal: the bias is that of the updates before.

  Attributes:
    bias_rate: added to a bias after an update that gave its expert less than
      the mean load, and subtracted where it was more; 0: there is no bias.
    num_groups: of neighbouring experts; a divisor of num_experts.
    groups_kept: a token's experts are of that many groups: those with the
      highest sums of their two highest scores.
  """

  bias_rate: float = 0.001
  num_groups: int = 1
  groups_kept: int = 1

  def __post_init__(self):
    size, rest = divmod(self.num_experts, max(self.num_groups, 1))
    if self.num_groups < 1 or rest:
      raise ValueError(
        f'num_groups={self.num_groups} must divide '
        f'num_experts={self.num_experts}'
      )
    if not self.top_k / size <= self.groups_kept <= self.num_groups:
      raise ValueError(
        f'groups_kept={self.groups_kept} must hold top_k={self.top_k} '
        f'experts, {size} a group, and be at most '
        f'num_groups={self.num_groups}'
      )
    if self.bias_rate < 0:
      raise ValueError(f'bias_rate={self.bias_rate} must be >= 0')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Rows, tokens: Tokens, mask: Mask, bias: Bias, train: bool
  ) -> Routing:
    del tokens, train
    logits = self.scores(x)
    scores = jax.nn.sigmoid(logits)
    expert = self.highest(
      self._in_kept_groups(scores if bias is None else scores + bias)
    )
    weight = chosen(scores, expert)
    weight /= jnp.sum(weight, axis=-1, keepdims=True)
    probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    return make_routing(expert, weight, probs, mask, self.balance, logits)

  def _in_kept_groups(self, scores):
    """`scores`, -inf outside of the groups that are kept."""
    if self.groups_kept == self.num_groups:
      return scores
    groups = scores.reshape(len(scores), self.num_groups, -1)
    two = jax.lax.top_k(groups, min(2, groups.shape[-1]))[0]
    _, kept = jax.lax.top_k(two.sum(axis=-1), self.groups_kept)
    is_kept = jnp.any(kept[..., None] == jnp.arange(self.num_groups), axis=1)
    with jax.debug_infs(False):  # JAX_DEBUG_INFS is not about this mask.
      masked = jnp.where(is_kept[..., None], groups, -jnp.inf)
      return masked.reshape(scores.shape)


class NoisyTopK(Router):
  """TopK of logits with noise, as wide as the router learns; in training alone.

  Shazeer et al. 2017, eq. 3 to 5: logits + normal * softplus(x @ noise), both
  matrices zero at first. Causal: a token's noise is its own.
  """

  @nn.compact
  def __call__(
    self, x: Rows, tokens: Tokens, mask: Mask, bias: Bias, train: bool
  ) -> Routing:
    del tokens, bias
    zeros = nn.initializers.zeros_init()
    logits = self.scores(x, init=zeros)
    width = jax.nn.softplus(self.scores(x, 'noise', zeros))
    if train:
      key = self.make_rng('routing')
      logits += width * jax.random.normal(key, logits.shape, logits.dtype)
    expert = self.highest(logits)
    weight = jax.nn.softmax(chosen(logits, expert))
    probs = jax.nn.softmax(logits)
    return make_routing(expert, weight, probs, mask, self.balance, logits)


class Hash(Router):
  """A fixed random table, from a token's number to its experts; no parameter.

  Roller et al. 2021 (random hash), with K experts of weight 1 / K. Balanced
  over the vocabulary at each rank; not over a text, where tokens have their
  frequencies. Causal. No loss has a gradient here.

  Attributes:
    vocab_size: of the tokenizer.
    seed: of the table.
  """

  vocab_size: int
  seed: int = 0

  def __post_init__(self):
    if self.seed < 0:
      raise ValueError(f'seed={self.seed} must be >= 0')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Rows, tokens: Tokens, mask: Mask, bias: Bias, train: bool
  ) -> Routing:
    del bias, train
    expert = jnp.asarray(self.table())[tokens.reshape(-1)]
    weight = jnp.full(expert.shape, 1 / self.top_k, x.dtype)
    assigned = expert[..., None] == jnp.arange(self.num_experts)
    probs = jnp.sum(assigned, axis=1) / self.top_k
    return make_routing(expert, weight, probs, mask, self.balance)

  def table(self) -> Int[np.ndarray, 'vocab k']:
    """Of each token: K different experts."""
    place = np.random.default_rng(self.seed).permutation(self.vocab_size)
    turn, first = np.divmod(place[:, None], self.num_experts)
    # Tokens with the same turn have, at each rank, all experts between them.
    step = 1 + (turn + np.arange(self.top_k - 1)) % max(self.num_experts - 1, 1)
    return np.hstack([first, (first + step) % self.num_experts]).astype(
      np.int32
    )


class ExpertChoice(Router):
  """Each expert chooses the same number of tokens, by softmax over experts.

  Zhou et al. 2022, sec. 3.2, eq. 1 and 2: C = ceil(N * capacity_factor / E) of
  the batch's N tokens. A token may have any number of experts, or none. Not
  causal: experts choose among later tokens and other sequences too, so a
  training or validation loss is better than any text that could be generated.

  Attributes:
    capacity_factor: experts for a token in the mean; None: top_k.
  """

  capacity_factor: float | None = None

  causal: ClassVar[bool] = False

  def __post_init__(self):
    if self.capacity_factor is not None and self.capacity_factor <= 0:
      raise ValueError(f'capacity_factor={self.capacity_factor} must be > 0')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Rows, tokens: Tokens, mask: Mask, bias: Bias, train: bool
  ) -> Routing:
    del tokens, bias, train
    logits = self.scores(x)
    probs = jax.nn.softmax(logits)
    share = (self.capacity_factor or self.top_k) / self.num_experts
    # Rows for a batch without padding; fewer tokens leave the last ones empty.
    num_rows = math.ceil(min(len(probs) * share, len(probs)))
    of_experts = jnp.where(mask.reshape(-1), probs.T, -1)
    weight, token = jax.lax.top_k(of_experts, num_rows)
    is_used = jnp.arange(num_rows) < jnp.ceil(jnp.sum(mask) * share)
    every = jnp.arange(self.num_experts)[:, None]
    expert = jnp.where(is_used, every, self.num_experts)
    return make_routing(
      expert.reshape(-1, 1),
      weight.reshape(-1, 1),
      probs,
      mask,
      self.balance,
      logits,
      token.reshape(-1),
    )


ROUTERS = {
  router.__name__: router
  for router in (TopK, Softmax, Sigmoid, NoisyTopK, Hash, ExpertChoice)
}
