"""What a router says: which experts a token goes to, with what weight."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe.moe.losses import BALANCE, count, entropy, z_loss
from trainers.metrics import Mean


class RouterInputs(NamedTuple):
  """What a router may use of tokens, beside their activations.

  Attributes:
    tokens: their numbers in the vocabulary.
    mask: False for padding, which counts in no load and no loss.
    bias: what is added to a layer's scores when experts are selected, or None.
  """

  tokens: Int[Array, 'batch time']
  mask: Bool[Array, 'batch time']
  bias: Float[Array, ' experts'] | None = None


class Routing(NamedTuple):
  """Where N = batch * time tokens go: rows, of K experts each.

  Attributes:
    expert: the experts of a row, first choice first; E (one past the last)
      where nothing is: padding is computed nowhere.
    weight: of each expert's output.
    probs: of all experts, whatever was selected.
    load: assignments per expert.
    losses: unweighted, by name.
    metrics: further ones, by name: sums and counts over the tokens.
    token: which a row is of; None: row i is of token i. With it, experts can
      choose: an expert's C tokens are C rows with K = 1, so that the work is
      that of the rows, whatever the dispatch.
  """

  expert: Int[Array, 'rows k']
  weight: Float[Array, 'rows k']
  probs: Float[Array, 'tokens experts']
  load: Int[Array, ' experts']
  losses: Mapping[str, Float[Array, '']]
  metrics: Mapping[str, Mean]
  token: Int[Array, ' rows'] | None = None


def chosen(
  of_experts: Float[Array, 'tokens experts'], expert: Int[Array, 'tokens k']
) -> Float[Array, 'tokens k']:
  """of_experts[t, expert[t, k]], by a mask: indexing's gradient scatters."""
  mask = expert[..., None] == jnp.arange(of_experts.shape[-1])
  return jnp.sum(jnp.where(mask, of_experts[:, None], 0), axis=-1)


def make_routing(
  expert: Int[Array, 'rows k'],
  weight: Float[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  balance: str,
  logits: Float[Array, 'tokens experts'] | None = None,
  token: Int[Array, ' rows'] | None = None,
) -> Routing:
  """Routing to `expert`; padding, where `mask` is False, goes nowhere.

  Its metrics: `router_entropy`, in nats, and `first_gate`, the mean weight of
  first choices; where experts choose, of all that were.

  Args:
    expert, weight, probs, token: as of `Routing`.
    mask: False for padding.
    balance: a name in BALANCE.
    logits: for the z-loss, which is 0 without them.
  """
  num_experts = probs.shape[-1]
  flat = mask.reshape(-1)
  rows = flat if token is None else flat[token]
  expert = jnp.where(rows[:, None], expert, num_experts)
  has_expert = (expert[:, 0] < num_experts).astype(weight.dtype)
  first = Mean(jnp.sum(weight[:, 0] * has_expert), jnp.sum(has_expert))
  nats = entropy(probs, flat)
  zero = jnp.zeros((), probs.dtype)
  return Routing(
    expert=expert,
    weight=weight,
    probs=probs,
    load=jnp.sum(count(expert, num_experts), axis=0),
    losses={
      'balance': BALANCE[balance].layer(expert, probs, mask, token),
      'z_loss': zero if logits is None else z_loss(logits, flat),
      'router_entropy': nats.total / jnp.maximum(nats.count, 1),
    },
    metrics={'router_entropy': nats, 'first_gate': first},
    token=token,
  )
