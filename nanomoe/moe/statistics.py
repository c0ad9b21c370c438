"""Counts over a batch of which experts were chosen: for what, with what others.

By products with one-hot rows: nothing is sorted, nothing scattered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nanomoe.ops import matmul
from trainers.metrics import Mean


def max_vio(load: Float[Array, 'layers experts']) -> Mean:
  """MaxVio of a batch: (largest load - mean load) / mean load.

  Merged, it is the mean over batches, by their assignments: MaxVio_batch of
  Wang et al. 2024, sec. 4.1. MaxVio_global there, of the sum of all batches, is
  max_over_mean_load - 1, and no more than this.
  """
  count = jnp.sum(load, axis=-1)
  return Mean(load.shape[-1] * jnp.max(load, axis=-1) - count, count)


def first_choice_pairs(
  expert: Int[Array, 'layers tokens k'], num_experts: int
) -> Float[Array, 'layers experts experts']:
  """[l, i, j]: tokens whose first choice is j in layer l, i in the one before.

  In the first layer i is 0: nothing is before it, and tells nothing. Padding,
  whose expert is num_experts, is nowhere.
  """
  first = expert[:, :, 0]
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
  """[l, e, v]: how often watched[v] was assigned to expert e in layer l.

  Args:
    expert, token: as of `Routing`, of each layer.
    inputs: what the tokens are, in the vocabulary.
    watched: which of the vocabulary are counted.
    num_experts: E; padding has this for its expert.
  """

  def of_layer(expert, token):
    words = inputs.reshape(-1)
    words = words if token is None else words[token]
    is_word = (words[:, None] == watched).astype(jnp.float32)
    assigned = jax.nn.one_hot(expert, num_experts).sum(axis=1)
    return matmul.einsum('re,rv->ev', assigned, is_word, 'float32')

  return jax.vmap(of_layer, in_axes=(0, None if token is None else 0))(
    expert, token
  )
