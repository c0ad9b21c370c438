"""Causal attention by blocks of rows, without most of the masked scores."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Number of blocks into which a window's rows are split.
NUM_BLOCKS = 4


# Compiled as one function: it is traced for one layer, not for each.
@functools.partial(
  jax.jit, static_argnames=('attend', 'dropout_rate', 'precision')
)
def attend_by_blocks(
  attend: Callable[..., jax.Array],
  q: Float[Array, 'batch heads time d_head'],
  k: Float[Array, 'batch heads time d_head'],
  v: Float[Array, 'batch heads time d_head'],
  key: jax.Array | None,
  *,
  dropout_rate: float,
  precision: str,
) -> Float[Array, 'batch heads time d_head']:
  """Returns `attend(q, k, v)`, computed for one block of rows after the other.

  A block gets the keys and values up to its last row. With 4 blocks, 5 eighths
  of the scores are computed; the causal mask keeps half of them.

  Args:
    attend: Causal attention of a block of rows, such as
      `nanomoe.model.attention.attend`. It is called as `attend(q, k, v, start,
      key, dropout_rate=..., precision=...)`, where `start` is the position of
      the first row.
    q: Queries.
    k: Keys of the same positions.
    v: Values of the same positions.
    key: Random key of the dropout; None disables it. Each block gets a key of
      its own.
    dropout_rate: Dropout rate of the attention weights.
    precision: Precision of the matrix products.
  """
  time = q.shape[2]
  size = -(-time // NUM_BLOCKS)
  blocks = [slice(i, min(i + size, time)) for i in range(0, time, size)]
  stops = tuple(block.stop for block in blocks)
  outputs = []
  for block, keys, values in zip(
    blocks, _prefixes(k, stops), _prefixes(v, stops), strict=True
  ):
    block_key = None if key is None else jax.random.fold_in(key, block.start)
    outputs.append(
      attend(
        q[:, :, block],
        keys,
        values,
        block.start,
        block_key,
        dropout_rate=dropout_rate,
        precision=precision,
      )
    )
  return jnp.concatenate(outputs, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _prefixes(
  x: Float[Array, 'batch heads time d_head'], stops: tuple[int, ...]
) -> tuple[Float[Array, 'batch heads _ d_head'], ...]:
  """Returns `x[:, :, :stop]` for each stop, of which the last is the end.

  The gradients of the prefixes are added up in place. XLA would pad the
  gradient of each slice and add them up, element by element, wherever the sum
  is read.
  """
  return tuple(x[:, :, :stop] for stop in stops)


def _prefixes_forward(x, stops):
  return _prefixes(x, stops), None


def _prefixes_backward(stops, _, gs):
  *others, total = gs
  for g, stop in zip(others, stops[:-1], strict=True):
    total = jax.lax.dynamic_update_slice(
      total, total[:, :, :stop] + g, (0, 0, 0, 0)
    )
  return (total,)


_prefixes.defvjp(_prefixes_forward, _prefixes_backward)
