"""Sampling text from a model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def generate(
  logits: Callable[[Int[Array, 'batch time']], jax.Array],
  prompt: Int[Array, 'batch prompt'],
  key: jax.Array,
  *,
  num_tokens: int,
  block_size: int,
  temperature: float,
) -> Int[Array, 'batch num_tokens']:
  """Continues `prompt` by `num_tokens`; traceable, one compilation.

  Each token sees the last `block_size` ones. The window is filled from the
  left: what stands to the right of the last token cannot be seen by it.

  Args:
    logits: tokens -> [batch, time, vocab].
    prompt: at least one token.
    key: of the sampling.
    num_tokens: how many to make.
    block_size: length of the window.
    temperature: divides the logits; 0 takes the likeliest.
  """
  prompt = prompt[:, -block_size:]
  length = prompt.shape[1]
  window = jnp.zeros((prompt.shape[0], block_size), jnp.int32)
  window = window.at[:, :length].set(prompt)

  def next_token(carry, key):
    window, length = carry
    last = jax.lax.dynamic_index_in_dim(
      logits(window), length - 1, axis=1, keepdims=False
    )
    if temperature:
      token = jax.random.categorical(key, last / temperature)
    else:
      token = jnp.argmax(last, axis=-1)
    full = length == block_size
    window = jnp.where(full, jnp.roll(window, -1, axis=1), window)
    length = jnp.where(full, length, length + 1)
    window = jax.lax.dynamic_update_index_in_dim(
      window, token.astype(jnp.int32), length - 1, axis=1
    )
    return (window, length), token

  keys = jax.random.split(key, num_tokens)
  _, tokens = jax.lax.scan(next_token, (window, jnp.int32(length)), keys)
  return tokens.T
