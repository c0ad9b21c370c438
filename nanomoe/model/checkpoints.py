"""Layouts of parameters in checkpoints, and the upgrade of older ones."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.model.attention import ATTENTIONS, CausalSelfAttention
from trainers import spec
from trainers.checkpoint.reader import Layout

# 1: all queries, all keys, all values. 2: by group of heads.
_LAYOUT = 2


def layout(config: Config) -> Layout:
  """Returns the layout of a config's checkpoints.

  Args:
    config: Config of the run that saved the checkpoints.
  """
  attention = config.model.attention.type
  kind = spec.resolve('model.attention', attention, ATTENTIONS)
  if not (isinstance(kind, type) and issubclass(kind, CausalSelfAttention)):
    return Layout(_LAYOUT)  # The parameters of a plug-in are its own.
  num_heads = config.model.num_heads
  num_kv_heads = config.model.num_kv_heads or num_heads
  d_head = config.model.d_model // num_heads
  num_features = (num_heads + 2 * num_kv_heads) * d_head
  group = functools.partial(
    group_features, num_heads=num_heads, num_kv_heads=num_kv_heads
  )

  def upgrade(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
      name: group(x)
      if '.attention.qkv.' in name and x.shape[-1:] == (num_features,)
      else x
      for name, x in arrays.items()
    }

  return Layout(_LAYOUT, upgrade)


def group_features(
  x: Shaped[Array, '*shape features'], num_heads: int, num_kv_heads: int
) -> Shaped[Array, '*shape features']:
  """Returns features of queries, keys and values, ordered by group of heads.

  A group has `num_heads / num_kv_heads` queries, and the key and the value that
  they share. A tensor axis that divides the groups keeps each of them on one
  device.

  Args:
    x: Array whose last axis has the features of all queries, then those of all
      keys, then those of all values.
    num_heads: Number of heads of the queries.
    num_kv_heads: Number of heads of the keys, and of the values.
  """
  query = np.arange(num_heads).reshape(num_kv_heads, -1)
  key = num_heads + np.arange(num_kv_heads)[:, None]
  order = np.concatenate([query, key, key + num_kv_heads], axis=1).ravel()
  heads = x.reshape(*x.shape[:-1], len(order), -1)
  return jnp.take(heads, order, axis=-2).reshape(x.shape)
