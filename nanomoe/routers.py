"""Which experts a token goes to, with what weight, and how evenly."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe import numerics
from trainers.metrics import Mean


class Routing(NamedTuple):
  """Where N tokens go, K experts each.

  Attributes:
    expert: the experts of a token, first choice first; E (one past the last)
      where the token is padding: it is computed nowhere.
    weight: of each expert's output.
    probs: softmax over all experts, whatever was selected.
    load: assignments per expert.
    losses: unweighted, by name.
    metrics: further ones, by name: sums and counts over the tokens.
  """

  expert: Int[Array, 'tokens k']
  weight: Float[Array, 'tokens k']
  probs: Float[Array, 'tokens experts']
  load: Int[Array, ' experts']
  losses: Mapping[str, Float[Array, '']]
  metrics: Mapping[str, Mean]


class TopK(nn.Module):
  """Softmax over the logits of the `top_k` highest experts; no bias, no noise.

  Shazeer et al. 2017, eq. 3 and 5, without noise. Causal: a token's experts
  depend on that token alone.

  Attributes:
    num_experts: E.
    top_k: K.
    balance: a name in `BALANCE`.
  """

  num_experts: int
  top_k: int
  balance: str

  @nn.compact
  def __call__(
    self, x: Float[Array, 'tokens d_model'], mask: Bool[Array, ' tokens']
  ) -> Routing:
    kernel = self.param(
      'kernel',
      nn.initializers.xavier_uniform(),
      (x.shape[-1], self.num_experts),
    )
    # Always float32: a rounded logit changes the choice, not only its weight.
    logits = numerics.dot('nd,de->ne', x, kernel, 'float32')
    _, expert = jax.lax.top_k(jax.lax.stop_gradient(logits), self.top_k)
    weight = jax.nn.softmax(chosen(logits, expert))
    return make_routing(
      expert, weight, jax.nn.softmax(logits), mask, self.balance
    )


def chosen(
  of_experts: Float[Array, 'tokens experts'], expert: Int[Array, 'tokens k']
) -> Float[Array, 'tokens k']:
  """of_experts[t, expert[t, k]], by a mask: indexing's gradient scatters."""
  mask = expert[..., None] == jnp.arange(of_experts.shape[-1])
  return jnp.sum(jnp.where(mask, of_experts[:, None], 0), axis=-1)


def make_routing(
  expert: Int[Array, 'tokens k'],
  weight: Float[Array, 'tokens k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, ' tokens'],
  balance: str,
) -> Routing:
  """Routing to `expert`; padding, where `mask` is False, goes nowhere."""
  num_experts = probs.shape[-1]
  expert = jnp.where(mask[:, None], expert, num_experts)
  return Routing(
    expert=expert,
    weight=weight,
    probs=probs,
    load=jnp.sum(count(expert, num_experts), axis=0),
    losses={'balance': BALANCE[balance].layer(expert, probs, mask)},
    metrics={'router_entropy': entropy(probs, mask)},
  )


def entropy(
  probs: Float[Array, 'tokens experts'], mask: Bool[Array, ' tokens']
) -> Mean:
  """-sum_e p_te ln p_te, in nats: 0 if certain, ln E if uniform."""
  nats = jnp.sum(jax.scipy.special.entr(probs), axis=-1)
  return Mean(jnp.sum(nats * mask), jnp.sum(mask, dtype=nats.dtype))


def count(
  expert: Int[Array, 'tokens k'], num_experts: int
) -> Int[Array, 'k experts']:
  """How many tokens chose an expert, by rank of the choice."""
  chosen = expert[..., None] == jnp.arange(num_experts)
  return jnp.sum(chosen, axis=0, dtype=jnp.int32)


def balance_of_first_choice(expert, probs, mask) -> Float[Array, '']:
  """E * sum_e f_e P_e: f the share of tokens whose first choice is e.

  P the mean probability of e. 1 if uniform, E if collapsed.
  Fedus et al. 2021, eq. 4, applied to the first of the K choices.
  """
  return _balance(count(expert[:, :1], probs.shape[-1])[0], probs, mask)


def balance_of_all_choices(expert, probs, mask) -> Float[Array, '']:
  """E * sum_e f_e P_e: f the share of all N * K assignments that e has.

  P the mean probability of e. 1 if uniform, E / K if collapsed on K experts.
  """
  return _balance(count(expert, probs.shape[-1]).sum(axis=0), probs, mask)


def _balance(load, probs, mask):
  share = load / jnp.maximum(load.sum(), 1)
  weight = mask.astype(probs.dtype)[:, None]
  mean_probs = jnp.sum(probs * weight, axis=0) / jnp.maximum(weight.sum(), 1)
  return probs.shape[-1] * jnp.sum(share * mean_probs)


class Balance(NamedTuple):
  """A load-balance loss: of a layer, and how layers are joined."""

  layer: Callable[..., Float[Array, '']]
  join: Callable[[Float[Array, ' layers']], Float[Array, '']]


BALANCE = {
  # The sum over layers: num_layers if routing is uniform.
  'documented': Balance(balance_of_first_choice, jnp.sum),
  # 1 if routing is uniform, whatever the depth.
  'mean': Balance(balance_of_all_choices, jnp.mean),
}

ROUTERS = {'TopK': TopK}
