"""Routers: Linen modules that choose the experts of each token.

A router is called as `router(x, inputs, train=train)` and returns a `Routing`.
`x` are activations, `float[batch, time, d_model]`; `inputs` are a
`RouterInputs` of token ids, padding mask and selection bias.

A router with a `bias_rate` above 0 gets a bias from model_state. After each
update the bias moves by that rate towards experts with less than the mean load.

The class attribute `causal` says whether a token's experts and weights are
independent of later tokens and of other sequences. tests/test_causality.py
measures it.

The class attribute or property `separable` says whether training routes each
sequence by itself, without noise. Gradients are accumulated with such routers
alone.

The class attribute or property `normalized` says whether the weights of a
token's experts sum to `route_scale`. Upcycling needs such a router.
"""

import dataclasses
import inspect
import math
from typing import ClassVar

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from nanomoe.moe.routing import (
  RouterInputs,
  Routing,
  gather_scores,
  make_routing,
)
from nanomoe.ops import matmul, partition

Activations = Float[Array, 'batch time d_model']

XAVIER = nn.initializers.xavier_uniform()


class Router(nn.Module):
  """Base class of the routers of this package; a plug-in may use it too.

  Attributes:
    num_experts: Number of experts, E.
    top_k: Number of experts of a token, K.
    balance: Definition of the balance loss, a key of `losses.BALANCE`.
    route_scale: Factor of the weights of the chosen experts, > 0. DeepSeek-AI
      2024 (V3) uses 2.5.
  """

  num_experts: int
  top_k: int
  balance: str
  # Keyword-only: routers may have arguments without a default.
  route_scale: float = dataclasses.field(default=1.0, kw_only=True)

  causal: ClassVar[bool] = True
  separable: ClassVar[bool] = True
  normalized: ClassVar[bool] = False

  def __post_init__(self):
    """Raises ValueError if `route_scale` is not positive."""
    if self.route_scale <= 0:
      raise ValueError(f'route_scale={self.route_scale} must be > 0')
    super().__post_init__()

  def scores(
    self,
    x: Activations,
    name: str = 'kernel',
    init: nn.initializers.Initializer = XAVIER,
  ) -> Float[Array, 'tokens experts']:
    """Returns the logits `x @ kernel` of a new parameter `name`.

    The product is float32 whatever the config's precision: a rounded logit
    changes the choice of experts, not only their weights.
    """
    kernel = self.param(name, init, (x.shape[-1], self.num_experts))
    x = x.reshape(-1, x.shape[-1])  # [tokens, d_model]
    return matmul.einsum('nd,de->ne', x, kernel, 'float32')

  def highest(
    self, scores: Float[Array, 'tokens experts']
  ) -> Int[Array, 'tokens k']:
    """Returns the K experts with the highest scores, highest first."""
    return partition.highest(scores, self.top_k)[1]

  def make_routing(
    self,
    expert: Int[Array, 'rows k'],
    weight: Float[Array, 'rows k'],
    probs: Float[Array, 'tokens experts'],
    inputs: RouterInputs,
    logits: Float[Array, 'tokens experts'] | None = None,
    token: Int[Array, ' rows'] | None = None,
  ) -> Routing:
    """Builds the routing with this router's scale and balance loss.

    Args:
      expert: Experts of each row, as in `Routing`.
      weight: Weights of these experts, before `route_scale`.
      probs: Probabilities of all experts, as in `Routing`.
      inputs: The inputs of the router.
      logits: Logits for the z-loss, which is 0 without them.
      token: Token of each row, as in `Routing`.

    Returns:
      The routing of the layer.
    """
    if self.route_scale != 1:
      weight = self.route_scale * weight
    return make_routing(
      expert, weight, probs, inputs.mask, self.balance, logits, token
    )


class TopK(Router):
  """Router by a softmax over the logits of the `top_k` highest experts.

  Shazeer et al. 2017, eq. 3 and 5, without noise. The router is causal: a
  token's experts depend on that token alone.
  """

  normalized: ClassVar[bool] = True

  @nn.compact
  def __call__(
    self, x: Activations, inputs: RouterInputs, *, train: bool
  ) -> Routing:
    """Routes `x`; `train` has no effect."""
    del train
    logits = self.scores(x)  # [tokens, experts]
    expert = self.highest(logits)  # [tokens, k]
    weight = jax.nn.softmax(gather_scores(logits, expert))  # [tokens, k]
    probs = jax.nn.softmax(logits)  # [tokens, experts]
    return self.make_routing(expert, weight, probs, inputs, logits)


class Softmax(Router):
  """Router by the `top_k` highest probabilities of a softmax over all experts.

  Fedus et al. 2021 (Switch), eq. 1 and 2; Muennighoff et al. 2024 (OLMoE). The
  router is causal.

  Attributes:
    renormalize: Divides weights by their sum, as Jiang et al. 2024 (Mixtral)
      and Qwen3 do. The result is that of `TopK`, in another order of steps.
    jitter: Half width of the noise on the router's input, in training. Each
      element is multiplied by a number uniform in 1 - jitter to 1 + jitter.
      Switch, app. C. 0 disables it.
  """

  renormalize: bool = False
  jitter: float = 0.0

  def __post_init__(self):
    """Raises ValueError if `jitter` is not in [0, 1)."""
    if not 0 <= self.jitter < 1:
      raise ValueError(f'jitter={self.jitter} must be >= 0 and < 1')
    super().__post_init__()

  @property
  def separable(self) -> bool:  # pyright: ignore
    """The router is separable if `jitter` is 0."""
    return self.jitter == 0

  @property
  def normalized(self) -> bool:  # pyright: ignore
    """The router is normalized if it renormalizes weights."""
    return self.renormalize

  @nn.compact
  def __call__(
    self, x: Activations, inputs: RouterInputs, *, train: bool
  ) -> Routing:
    """Routes `x`, with jitter if `train`."""
    if train and self.jitter:
      key, bounds = self.make_rng('routing'), (1 - self.jitter, 1 + self.jitter)
      x *= jax.random.uniform(key, x.shape, x.dtype, *bounds)
    logits = self.scores(x)  # [tokens, experts]
    probs = jax.nn.softmax(logits)  # [tokens, experts]
    expert = self.highest(probs)  # [tokens, k]
    weight = gather_scores(probs, expert)  # [tokens, k]
    if self.renormalize:
      weight /= jnp.sum(weight, axis=-1, keepdims=True)
    return self.make_routing(expert, weight, probs, inputs, logits)


class Sigmoid(Router):
  """Router by sigmoid scores, with a bias that selects but does not weigh.

  The bias balances loads, so moe.aux_weight may be 0. Probabilities are the
  scores over their sum. DeepSeek-AI 2024 (V3), eq. 12 to 16, and Wang et al.
  2024, algorithm 1. The router is causal: the bias depends on earlier updates
  alone.

  Attributes:
    bias_rate: Step of the bias after each update: up for experts with less
      than the mean load, down for experts with more. 0 disables the bias.
    num_groups: Number of groups of neighbouring experts, a divisor of
      num_experts.
    groups_kept: Number of groups that a token's experts may come from. Groups
      are ranked by the sum of their two highest scores.
  """

  bias_rate: float = 0.001
  num_groups: int = 1
  groups_kept: int = 1

  normalized: ClassVar[bool] = True

  def __post_init__(self):
    """Raises ValueError if groups do not fit the experts."""
    size, rest = divmod(self.num_experts, max(self.num_groups, 1))
    if self.num_groups < 1 or rest:
      raise ValueError(
        f'num_groups={self.num_groups} must divide '
        f'num_experts={self.num_experts}'
      )
    if not self.top_k / size <= self.groups_kept <= self.num_groups:
      raise ValueError(
        f'groups_kept={self.groups_kept} must hold top_k={self.top_k} '
        f'experts, {size} per group, and be at most '
        f'num_groups={self.num_groups}'
      )
    if self.bias_rate < 0:
      raise ValueError(f'bias_rate={self.bias_rate} must be >= 0')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Activations, inputs: RouterInputs, *, train: bool
  ) -> Routing:
    """Routes `x`, selecting by scores plus `inputs.bias`."""
    del train
    logits = self.scores(x)  # [tokens, experts]
    scores = jax.nn.sigmoid(logits)
    selection = scores if inputs.bias is None else scores + inputs.bias
    expert = self.highest(self._in_kept_groups(selection))  # [tokens, k]
    weight = gather_scores(scores, expert)  # [tokens, k]
    weight /= jnp.sum(weight, axis=-1, keepdims=True)
    probs = scores / jnp.sum(scores, axis=-1, keepdims=True)
    return self.make_routing(expert, weight, probs, inputs, logits)

  def _in_kept_groups(self, scores):
    """Returns `scores` with -inf outside of each token's kept groups."""
    if self.groups_kept == self.num_groups:
      return scores
    groups = scores.reshape(len(scores), self.num_groups, -1)  # [N, groups, _]
    two, _ = partition.highest(groups, min(2, groups.shape[-1]))
    _, kept = partition.highest(two.sum(axis=-1), self.groups_kept)  # [N, kept]
    is_kept = jnp.any(kept[..., None] == jnp.arange(self.num_groups), axis=1)
    # JAX_DEBUG_INFS must not find the infinities of this mask.
    with jax.debug_infs(False):
      masked = jnp.where(is_kept[..., None], groups, -jnp.inf)
      return masked.reshape(scores.shape)


class NoisyTopK(Router):
  """Router of `TopK` with noise on the logits, of learned width, in training.

  The logits are `x @ kernel + normal * softplus(x @ noise)`. Both matrices
  start at zero. Shazeer et al. 2017, eq. 3 to 5. The router is causal: each
  token has noise of its own.
  """

  separable: ClassVar[bool] = False
  normalized: ClassVar[bool] = True

  @nn.compact
  def __call__(
    self, x: Activations, inputs: RouterInputs, *, train: bool
  ) -> Routing:
    """Routes `x`, with noise if `train`."""
    zeros = nn.initializers.zeros_init()
    logits = self.scores(x, init=zeros)  # [tokens, experts]
    width = jax.nn.softplus(self.scores(x, 'noise', zeros))
    if train:
      key = self.make_rng('routing')
      logits += width * jax.random.normal(key, logits.shape, logits.dtype)
    expert = self.highest(logits)  # [tokens, k]
    weight = jax.nn.softmax(gather_scores(logits, expert))  # [tokens, k]
    probs = jax.nn.softmax(logits)  # [tokens, experts]
    return self.make_routing(expert, weight, probs, inputs, logits)


class Hash(Router):
  """Router by a fixed random table from token ids to experts.

  The router has no parameters, so no loss has a gradient here. Each of the K
  experts has weight 1 / K. Loads are balanced over the vocabulary at each rank,
  but not over a text, whose tokens differ in frequency. Roller et al. 2021
  (random hash). The router is causal.

  Attributes:
    vocab_size: Size of the tokenizer's vocabulary.
    seed: Random seed of the table.
  """

  # Pyright does not know that a field of the base is keyword-only.
  vocab_size: int  # pyright: ignore
  seed: int = 0

  normalized: ClassVar[bool] = True

  def __post_init__(self):
    if self.seed < 0:
      raise ValueError(f'seed={self.seed} must be >= 0')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Activations, inputs: RouterInputs, *, train: bool
  ) -> Routing:
    """Routes `inputs.tokens`; `x` gives the type of the weights alone."""
    del train
    expert = jnp.asarray(self.table())[inputs.tokens.reshape(-1)]  # [tokens, k]
    weight = jnp.full(expert.shape, 1 / self.top_k, x.dtype)
    one_hot = expert[..., None] == jnp.arange(self.num_experts)
    probs = jnp.sum(one_hot, axis=1) / self.top_k  # [tokens, experts]
    return self.make_routing(expert, weight, probs, inputs)

  def table(self) -> Int[np.ndarray, 'vocab k']:
    """Returns K different experts for each token id."""
    place = np.random.default_rng(self.seed).permutation(self.vocab_size)
    turn, first = np.divmod(place[:, None], self.num_experts)
    # Tokens with the same turn have, at each rank, all experts between them.
    step = 1 + (turn + np.arange(self.top_k - 1)) % max(self.num_experts - 1, 1)
    return np.hstack([first, (first + step) % self.num_experts]).astype(
      np.int32
    )


class ExpertChoice(Router):
  """Router whose experts choose an equal number of tokens each.

  An expert takes the `C = ceil(N * capacity_factor / E)` tokens of the batch
  with its highest probabilities, which are a softmax over experts. A token may
  have any number of experts, or none. Zhou et al. 2022, sec. 3.2, eq. 1 and 2.

  The router is not causal: experts choose among later tokens and other
  sequences too. A training or validation loss is therefore lower than that of
  any text that could be generated.

  Attributes:
    capacity_factor: Mean number of experts of a token; None uses top_k.
  """

  capacity_factor: float | None = None

  causal: ClassVar[bool] = False
  separable: ClassVar[bool] = False

  def __post_init__(self):
    """Raises ValueError if `capacity_factor` is not positive."""
    if self.capacity_factor is not None and self.capacity_factor <= 0:
      raise ValueError(f'capacity_factor={self.capacity_factor} must be > 0')
    super().__post_init__()

  @nn.compact
  def __call__(
    self, x: Activations, inputs: RouterInputs, *, train: bool
  ) -> Routing:
    """Routes `x`; `train` has no effect."""
    del train
    logits = self.scores(x)  # [tokens, experts]
    probs = jax.nn.softmax(logits)
    share = (self.capacity_factor or self.top_k) / self.num_experts
    # Shapes are static: padding leaves the last rows of each expert empty.
    num_rows = math.ceil(min(len(probs) * share, len(probs)))
    candidates = jnp.where(inputs.mask.reshape(-1), probs.T, -1)
    weight, token = jax.lax.top_k(candidates, num_rows)  # [experts, rows]
    is_used = jnp.arange(num_rows) < jnp.ceil(jnp.sum(inputs.mask) * share)
    row_expert = jnp.arange(self.num_experts)[:, None]
    expert = jnp.where(is_used, row_expert, self.num_experts)
    return self.make_routing(
      expert.reshape(-1, 1),
      weight.reshape(-1, 1),
      probs,
      inputs,
      logits,
      token.reshape(-1),
    )


ROUTERS = {
  router.__name__: router
  for router in (TopK, Softmax, Sigmoid, NoisyTopK, Hash, ExpertChoice)
}


def interface_problem(router: object) -> str:
  """Returns why `router` cannot be called as a router, or '' if it can."""
  if not isinstance(router, nn.Module):
    return f'made a {type(router).__name__}; it must be a Linen module'
  try:
    inspect.signature(router).bind(None, None, train=True)
  except TypeError:
    return (
      f'{type(router).__name__}.__call__ must take (self, x, inputs, *, '
      'train), where inputs is a nanomoe.moe.RouterInputs with tokens, mask '
      'and bias'
    )
  return ''
