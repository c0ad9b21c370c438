"""What a router is asked for beside a low cross-entropy: losses of a layer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from trainers.metrics import Mean


def count(
  expert: Int[Array, 'rows k'], num_experts: int
) -> Int[Array, 'k experts']:
  """How many rows chose an expert, by rank of the choice."""
  chosen = expert[..., None] == jnp.arange(num_experts)
  return jnp.sum(chosen, axis=0, dtype=jnp.int32)


def balance_of_first_choice(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Float[Array, '']:
  """E * sum_e f_e P_e: f the share of tokens whose first choice is e.

  P the mean probability of e. 1 if uniform, E if collapsed.
  Fedus et al. 2021, eq. 4, applied to the first of the K choices.
  """
  del token
  load = count(expert[:, :1], probs.shape[-1])[0]
  return _balance(load, probs, mask.reshape(-1))


def balance_of_all_choices(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Float[Array, '']:
  """E * sum_e f_e P_e: f the share of all N * K assignments that e has.

  P the mean probability of e. 1 if uniform, E / K if collapsed on K experts.
  """
  del token
  load = count(expert, probs.shape[-1]).sum(axis=0)
  return _balance(load, probs, mask.reshape(-1))


def balance_of_sequences(
  expert: Int[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  token: Int[Array, ' rows'] | None = None,
) -> Float[Array, '']:
  """As of all choices, of each sequence by itself; the mean over sequences.

  DeepSeek-AI 2024 (V3), eq. 17 to 20. A sequence of padding counts in nothing.
  """
  num_sequences, time = mask.shape
  num_experts = probs.shape[-1]
  row = jnp.arange(len(expert)) if token is None else token
  chosen = jnp.sum(expert[..., None] == jnp.arange(num_experts), axis=1)
  load = jax.ops.segment_sum(chosen, row // time, num_sequences)
  probs = probs.reshape(num_sequences, time, num_experts)
  each = jax.vmap(_balance)(load, probs, mask)
  counted = mask.any(axis=1)
  return jnp.sum(each * counted) / jnp.maximum(counted.sum(), 1)


def _balance(load, probs, mask):
  share = load / jnp.maximum(load.sum(), 1)
  weight = mask.astype(probs.dtype)[:, None]
  mean_probs = jnp.sum(probs * weight, axis=0) / jnp.maximum(weight.sum(), 1)
  return probs.shape[-1] * jnp.sum(share * mean_probs)


def entropy(
  probs: Float[Array, 'tokens experts'], mask: Bool[Array, ' tokens']
) -> Mean:
  """-sum_e p_te ln p_te, in nats: 0 if certain, ln E if uniform."""
  # The gradient of p ln p is infinite at 0.
  safe = jnp.where(probs > 0, probs, 1)
  nats = jnp.sum(-probs * jnp.log(safe), axis=-1)
  return Mean(jnp.sum(nats * mask), jnp.sum(mask, dtype=nats.dtype))


def z_loss(
  logits: Float[Array, 'tokens experts'], mask: Bool[Array, ' tokens']
) -> Float[Array, '']:
  """The mean over tokens of logsumexp(logits)^2. Zoph et al. 2022, eq. 5.

  It keeps logits small, so that rounding changes them little.
  """
  squares = jax.nn.logsumexp(logits, axis=-1) ** 2
  return jnp.sum(squares * mask) / jnp.maximum(jnp.sum(mask), 1)


class Balance(NamedTuple):
  """A load-balance loss: of a layer, and how layers are joined."""

  layer: Callable[..., Float[Array, '']]
  join: Callable[[Float[Array, ' layers']], Float[Array, '']]


BALANCE = {
  # The sum over layers: num_layers if routing is uniform.
  'documented': Balance(balance_of_first_choice, jnp.sum),
  # 1 if routing is uniform, whatever the depth.
  'mean': Balance(balance_of_all_choices, jnp.mean),
  'sequence': Balance(balance_of_sequences, jnp.mean),
}
