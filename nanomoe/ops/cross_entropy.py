"""Cross-entropy and entropy of predictions, from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
  logits: Float[Array, 'batch time vocab'], targets: Int[Array, 'batch time']
) -> Float[Array, 'batch time']:
  """Returns `-log softmax(logits)[target]` of each token, in nats.

  A mask selects the target, because the gradient of indexing is a scatter.

  Args:
    logits: Logits.
    targets: Token ids.
  """
  vocab = jnp.arange(logits.shape[-1])
  target = jnp.sum(jnp.where(targets[..., None] == vocab, logits, 0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - target


def prediction_entropy(
  logits: Float[Array, 'batch time vocab'],
) -> Float[Array, 'batch time']:
  """Returns the entropy of `softmax(logits)` of each token, in nats.

  It is the expected cross-entropy of calibrated predictions. Predictions are
  overconfident if their cross-entropy is larger. Guo et al. 2017.

  Args:
    logits: Logits.
  """
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
