"""Losses of a router: load balance, z-loss and entropy of one layer.

A layer reports each loss as sums over its tokens or sequences, a `Mean` or a
`Shares`. So the sums of micro-batches can be added. `value` divides them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from trainers.metrics import Mean


class Shares(NamedTuple):
  """Balance loss `E * sum_e f_e P_e` of a layer or of several, as sums.

  `f_e` is expert e's share of the load; `P_e` is the mean probability of e.

  Attributes:
    load: Number of counted choices of each expert, `int32[..., experts]`.
    probs: Sum of the tokens' probabilities, `float32[..., experts]`.
    count: Number of tokens, `[...]`.
  """

  load: jax.Array
  probs: jax.Array
  count: jax.Array


def value(
  sums: Mean | Shares,
  count: Num[Array, '*#layers'] | None = None,
  load: Int[Array, '*layers experts'] | None = None,
) -> Float[Array, '*layers']:
  """Returns the loss of each layer.

  If `count` and `load` are those of a larger batch, the value is the part that
  these tokens contribute to the loss of that batch. The parts of all tokens add
  up to its loss, and their gradients to its gradient.

  Args:
    sums: Sums of a loss.
    count: Number of tokens or sequences to divide by; None for that of `sums`.
    load: Load of each expert; None for that of `sums`. A `Mean` ignores it.
  """
  if count is None:
    count = sums.count
  count = jnp.maximum(count, 1)
  if isinstance(sums, Mean):
    return sums.total / count
  if load is None:
    load = sums.load
  share = load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1)
  mean_probs = sums.probs / count[..., None]
  return load.shape[-1] * jnp.sum(share * mean_probs, axis=-1)


def count_choices(
  expert: Int[Array, 'rows k'], num_experts: int
) -> Int[Array, 'k experts']:
  """Returns the number of rows that chose each expert, by rank of the choice.

  Empty choices, whose expert is `num_experts`, are not counted.
  """
  one_hot = expert[..., None] == jnp.arange(num_experts)  # [rows, k, experts]
  return jnp.sum(one_hot, axis=0, dtype=jnp.int32)


def balance_of_first_choice(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Shares:
  """Returns the sums of the balance loss of first choices, `E * sum_e f_e P_e`.

  `f_e` is the share of tokens whose first choice is e; `P_e` is the mean
  probability of e. The loss is 1 if routing is uniform and E if it collapsed.
  Fedus et al. 2021, eq. 4, applied to the first of the K choices.

  Args:
    expert: Experts of each row, as in `Routing`.
    probs: Probabilities of all experts.
    mask: False for padding.
    token: Not used by this loss.
  """
  del token
  load = count_choices(expert[:, :1], probs.shape[-1])[0]
  return _shares(load, probs, mask.reshape(-1))


def balance_of_all_choices(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Shares:
  """Returns the sums of the balance loss of all choices, `E * sum_e f_e P_e`.

  `f_e` is the share of all N * K assignments that e has; `P_e` is the mean
  probability of e. The loss is 1 if routing is uniform and E / K if it
  collapsed on K experts.

  Args:
    expert: Experts of each row, as in `Routing`.
    probs: Probabilities of all experts.
    mask: False for padding.
    token: Not used by this loss.
  """
  del token
  load = count_choices(expert, probs.shape[-1]).sum(axis=0)
  return _shares(load, probs, mask.reshape(-1))


def balance_of_sequences(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Mean:
  """Returns the mean over sequences of each sequence's own balance loss.

  A sequence's loss is that of `balance_of_all_choices`. Sequences of padding
  alone are not counted. DeepSeek-AI 2024 (V3), eq. 17 to 20.

  Args:
    expert: Experts of each row, as in `Routing`.
    probs: Probabilities of all experts.
    mask: False for padding.
    token: Token of each row; None if row i belongs to token i.
  """
  num_sequences, time = mask.shape
  num_experts = probs.shape[-1]
  row_token = jnp.arange(len(expert)) if token is None else token
  choices = jnp.sum(expert[..., None] == jnp.arange(num_experts), axis=1)
  load = jax.ops.segment_sum(choices, row_token // time, num_sequences)
  probs = probs.reshape(num_sequences, time, num_experts)
  losses = value(jax.vmap(_shares)(load, probs, mask))  # [batch]
  is_counted = mask.any(axis=1)
  return Mean(jnp.sum(losses * is_counted), is_counted.sum())


def _shares(load, probs, mask):
  """Returns the sums of loads `[E]` and of probabilities `[N, E]`."""
  weight = mask.astype(probs.dtype)[:, None]
  return Shares(load, jnp.sum(probs * weight, axis=0), weight.sum())


def entropy(
  probs: Float[Array, 'tokens experts'], mask: Bool[Array, ' tokens']
) -> Mean:
  """Returns the mean of `-sum_e p_te ln p_te` over tokens, in nats.

  The entropy is 0 if the router is certain and ln E if it is uniform.
  """
  # The gradient of p ln p is infinite at 0.
  safe = jnp.where(probs > 0, probs, 1)
  nats = jnp.sum(-probs * jnp.log(safe), axis=-1)
  return Mean(jnp.sum(nats * mask), jnp.sum(mask, dtype=nats.dtype))


def z_loss(
  logits: Float[Array, 'tokens experts'], mask: Bool[Array, ' tokens']
) -> Mean:
  """Returns the mean over tokens of `logsumexp(logits)^2`.

  The loss keeps logits small, so that rounding changes them little. Zoph et
  al. 2022 (ST-MoE), eq. 5.
  """
  squares = jax.nn.logsumexp(logits, axis=-1) ** 2
  return Mean(jnp.sum(squares * mask), jnp.sum(mask))


class Balance(NamedTuple):
  """Load-balance loss of a model.

  Attributes:
    layer: Sums of the loss of one layer, `(expert, probs, mask, token) ->
      Shares | Mean`.
    join: Reduction of the layers' losses, `[layers] -> []`.
    of_sequences: Whether the loss is a mean over sequences, not over tokens.
  """

  layer: Callable[..., Shares | Mean]
  join: Callable[[Float[Array, ' layers']], Float[Array, '']]
  of_sequences: bool = False


# Values of the config key moe.balance.
BALANCE = {
  # The sum over layers equals the number of layers if routing is uniform.
  'switch_sum': Balance(balance_of_first_choice, jnp.sum),
  # The mean over layers is 1 if routing is uniform, at every depth.
  'all_choices': Balance(balance_of_all_choices, jnp.mean),
  'per_sequence': Balance(balance_of_sequences, jnp.mean, of_sequences=True),
}
