"""Losses of a router: load balance, z-loss and entropy of one layer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trainers.metrics import Mean


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
) -> Float[Array, '']:
  """Returns the balance loss of first choices, `E * sum_e f_e P_e`.

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
  return _balance(load, probs, mask.reshape(-1))


def balance_of_all_choices(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Float[Array, '']:
  """Returns the balance loss of all choices, `E * sum_e f_e P_e`.

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
  return _balance(load, probs, mask.reshape(-1))


def balance_of_sequences(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Float[Array, '']:
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
  losses = jax.vmap(_balance)(load, probs, mask)  # [batch]
  is_counted = mask.any(axis=1)
  return jnp.sum(losses * is_counted) / jnp.maximum(is_counted.sum(), 1)


def _balance(load, probs, mask):
  """Returns `E * sum_e f_e P_e` of loads `[E]` and probabilities `[N, E]`."""
  share = load / jnp.maximum(load.sum(), 1)
  weight = mask.astype(probs.dtype)[:, None]
  mean_probs = jnp.sum(probs * weight, axis=0) / jnp.maximum(weight.sum(), 1)
  return probs.shape[-1] * jnp.sum(share * mean_probs)


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
) -> Float[Array, '']:
  """Returns the mean over tokens of `logsumexp(logits)^2`.

  The loss keeps logits small, so that rounding changes them little. Zoph et
  al. 2022 (ST-MoE), eq. 5.
  """
  squares = jax.nn.logsumexp(logits, axis=-1) ** 2
  return jnp.sum(squares * mask) / jnp.maximum(jnp.sum(mask), 1)


class Balance(NamedTuple):
  """Load-balance loss of a model.

  Attributes:
    layer: Loss of one layer, `(expert, probs, mask, token) -> []`.
    join: Reduction of the layers' losses, `[layers] -> []`.
  """

  layer: Callable[..., Float[Array, '']]
  join: Callable[[Float[Array, ' layers']], Float[Array, '']]


# Values of the config key moe.balance.
BALANCE = {
  # The sum over layers equals the number of layers if routing is uniform.
  'switch_sum': Balance(balance_of_first_choice, jnp.sum),
  # The mean over layers is 1 if routing is uniform, at every depth.
  'all_choices': Balance(balance_of_all_choices, jnp.mean),
  'per_sequence': Balance(balance_of_sequences, jnp.mean),
}
