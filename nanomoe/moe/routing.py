"""Inputs and outputs of a router: the experts and weights of each token."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from nanomoe.moe.losses import (
  BALANCE,
  Shares,
  count_choices,
  entropy,
  z_loss,
)
from trainers.metrics import Mean


class RouterInputs(NamedTuple):
  """Everything that a router may use beside the activations.

  Attributes:
    tokens: Token ids, `int32[batch, time]`.
    mask: False for padding, `bool[batch, time]`. Padding counts in no load and
      in no loss.
    bias: Selection bias of the layer's experts, `float32[experts]`, or None if
      the router has no `bias_rate`.
  """

  tokens: Int[Array, 'batch time']
  mask: Bool[Array, 'batch time']
  bias: Float[Array, ' experts'] | None = None


class Routing(NamedTuple):
  """Expert assignment of N = batch * time tokens, as rows of K experts each.

  Attributes:
    expert: Experts of each row, first choice first. The value E, one past the
      last expert, marks an empty choice: padding is assigned to no expert.
    weight: Weight of each chosen expert's output.
    probs: Probabilities of all experts, whichever were selected.
    load: Number of assignments of each expert.
    losses: Unweighted losses by name, as sums over the tokens or sequences that
      `losses.value` divides.
    metrics: Further metrics by name, as sums and counts over the tokens.
    token: Token of each row; None if row i belongs to token i. Experts that
      choose tokens use it: C tokens of an expert are C rows with K = 1, so the
      work is proportional to the rows for every dispatch.
  """

  expert: Int[Array, 'rows k']
  weight: Float[Array, 'rows k']
  probs: Float[Array, 'tokens experts']
  load: Int[Array, ' experts']
  losses: Mapping[str, Mean | Shares]
  metrics: Mapping[str, Mean]
  token: Int[Array, ' rows'] | None = None


def gather_scores(
  scores: Float[Array, 'tokens experts'], expert: Int[Array, 'tokens k']
) -> Float[Array, 'tokens k']:
  """Returns `scores[t, expert[t, k]]` for every token t and choice k.

  A mask selects the scores, because the gradient of indexing is a scatter.
  """
  mask = expert[..., None] == jnp.arange(scores.shape[-1])  # [tokens, k, E]
  return jnp.sum(jnp.where(mask, scores[:, None], 0), axis=-1)


def make_routing(
  expert: Int[Array, 'rows k'],
  weight: Float[Array, 'rows k'],
  probs: Float[Array, 'tokens experts'],
  mask: Bool[Array, 'batch time'],
  balance: str,
  logits: Float[Array, 'tokens experts'] | None = None,
  token: Int[Array, ' rows'] | None = None,
) -> Routing:
  """Builds a `Routing` with its loads, losses and metrics.

  Padding, where `mask` is False, is assigned to no expert. The metrics are
  `router_entropy`, in nats, and `first_gate`, the mean weight of first choices.
  If experts choose tokens, `first_gate` is the mean weight of all choices.

  Args:
    expert: Experts of each row, as in `Routing`.
    weight: Weights of these experts, as in `Routing`.
    probs: Probabilities of all experts, as in `Routing`.
    mask: False for padding.
    balance: Definition of the balance loss, a key of `losses.BALANCE`.
    logits: Logits for the z-loss, which is 0 without them.
    token: Token of each row, as in `Routing`.

  Returns:
    The routing of the layer.
  """
  num_experts = probs.shape[-1]
  is_token = mask.reshape(-1)  # [tokens]
  is_used = is_token if token is None else is_token[token]  # [rows]
  expert = jnp.where(is_used[:, None], expert, num_experts)
  has_expert = (expert[:, 0] < num_experts).astype(weight.dtype)
  first_gate = Mean(jnp.sum(weight[:, 0] * has_expert), jnp.sum(has_expert))
  nats = entropy(probs, is_token)
  return Routing(
    expert=expert,
    weight=weight,
    probs=probs,
    load=jnp.sum(count_choices(expert, num_experts), axis=0),
    losses={
      'balance': BALANCE[balance].layer(expert, probs, mask, token),
      'z_loss': (
        Mean(jnp.zeros_like(nats.total), nats.count)
        if logits is None
        else z_loss(logits, is_token)
      ),
      'router_entropy': nats,
    },
    metrics={'router_entropy': nats, 'first_gate': first_gate},
    token=token,
  )
