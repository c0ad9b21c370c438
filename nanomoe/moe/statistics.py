"""Counts over a batch of which experts were chosen, and for which tokens.

Counts are products of one-hot rows, so nothing is sorted or scattered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.ops import matmul
from trainers.metrics import Mean


def max_vio(load: Float[Array, 'layers experts']) -> Mean:
  """Returns MaxVio of a batch: (largest load - mean load) / mean load.

  The mean over batches is weighted by their assignments. It is MaxVio_batch of
  Wang et al. 2024, sec. 4.1. MaxVio_global in that paper, of the summed loads
  of all batches, is `max_over_mean_load - 1`, and never larger.
  """
  num_assignments = jnp.sum(load, axis=-1)
  excess = load.shape[-1] * jnp.max(load, axis=-1) - num_assignments
  return Mean(excess, num_assignments)


def first_choice_pairs(
  expert: Int[Array, 'layers tokens k'], num_experts: int
) -> Float[Array, 'layers experts experts']:
  """Counts tokens by their first choices in a layer and in the layer before.

  Args:
    expert: Experts of each token, as in `Routing`, by layer.
    num_experts: Number of experts, E. Padding, whose expert is E, is not
      counted.

  Returns:
    Counts `[l, i, j]` of tokens whose first choice is j in layer l and i in
    layer l - 1. In the first layer, i is always 0.
  """
  first = expert[:, :, 0]  # [layers, tokens]
  before = jnp.concatenate([jnp.zeros_like(first[:1]), first[:-1]])
  before, first = (jax.nn.one_hot(e, num_experts) for e in (before, first))
  return matmul.einsum('lni,lnj->lij', before, first, 'float32')


def token_expert_counts(
  expert: Int[Array, 'layers rows k'],
  token: Int[Array, 'layers rows'] | None,
  inputs: Int[Array, 'batch time'],
  watched: Int[Array, ' watched'],
  num_experts: int,
) -> Float[Array, 'layers experts watched']:
  """Counts how often each watched token id was assigned to each expert.

  Args:
    expert: Experts of each row, as in `Routing`, by layer.
    token: Token of each row, as in `Routing`, by layer.
    inputs: Token ids.
    watched: Token ids to count.
    num_experts: Number of experts, E. Padding, whose expert is E, is not
      counted.

  Returns:
    Counts `[l, e, v]` of assignments of `watched[v]` to expert e in layer l.
  """

  def count_layer(expert, token):
    ids = inputs.reshape(-1)
    ids = ids if token is None else ids[token]  # [rows]
    is_watched = (ids[:, None] == watched).astype(jnp.float32)
    assigned = jax.nn.one_hot(expert, num_experts).sum(axis=1)  # [rows, E]
    return matmul.einsum('re,rv->ev', assigned, is_watched, 'float32')

  return jax.vmap(count_layer, in_axes=(0, None if token is None else 0))(
    expert, token
  )
