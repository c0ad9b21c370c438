"""Dropout with random bits from a hash, which are recomputed and never kept."""

import math
from typing import NoReturn

from flax import linen as nn
import jax
from jax.extend import random as extend
import jax.numpy as jnp

from trainers.errors import UserError

_THREEFRY = 'threefry2x32'


def keep_mask(
  key: jax.Array, rate: float, shape: tuple[int, ...]
) -> tuple[jax.Array, float]:
  """Returns a mask of kept elements, and the exact probability of keeping one.

  The 32 bits of element i are a hash of i and the key's first and last word,
  which a fold_in has mixed. XLA fuses the hash into the operation that uses the
  mask. Threefry costs four times as much on CPUs, where it is a loop that
  writes its words to memory.

  Args:
    key: Random key. A key of `key_of_rows` gives rows of a larger batch's mask.
    rate: Probability of dropping an element, rounded to 2**-32.
    shape: Shape of the mask; axis 0 is the batch.
  """
  words = jax.random.key_data(key).reshape(-1)
  rows = None
  if jax.random.key_impl(key) == _OF_ROWS:
    words, rows = words[:2], words[2:]
  index = jnp.zeros(shape, jnp.uint32)
  for axis in range(len(shape)):
    stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    if rows is not None and axis == 0:
      place = rows[0] + rows[1] * place
    index += stride * place
  # The second word enters between two rounds. In one round, the masks of two
  # keys would be permutations of each other by an exclusive or.
  bits = _mix(_mix(index ^ words[0]) + words[-1])
  threshold = round(rate * 2**32)
  return bits >= jnp.uint32(threshold), 1 - threshold / 2**32


def _mix(x: jax.Array) -> jax.Array:
  """Returns a bijection of 32 bits, in which each bit flips half of the others.

  Its constants are lowbias32 of Wellons 2018, "Prospecting for Hash Functions".
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def key_of_rows(
  key: jax.Array, first: int | jax.Array, stride: int
) -> jax.Array:
  """Returns a key under which dropout masks are rows of a larger batch's masks.

  Row i of a mask is row `first + stride * i` of the mask under `key`. Keys that
  fold_in and split derive keep the rows. So the rows reach every dropout of a
  model inside its random keys.

  Drawing other random numbers raises UserError: they would not be those of the
  larger batch.

  Args:
    key: Random key of JAX's default implementation, threefry.
    first: First row.
    stride: Distance between rows.

  Raises:
    ValueError: The key has another implementation.
  """
  if (impl := jax.random.key_impl(key)) != _THREEFRY:
    raise ValueError(f'key of {impl}: rows need a key of {_THREEFRY}')
  rows = jnp.stack([jnp.uint32(first), jnp.uint32(stride)])
  words = jnp.concatenate([jax.random.key_data(key), rows])
  return jax.random.wrap_key_data(words, impl=_OF_ROWS)


def _threefry(words: jax.Array) -> jax.Array:
  return jax.random.wrap_key_data(words[:2], impl=_THREEFRY)


def _fold_in(words: jax.Array, data: int | jax.Array) -> jax.Array:
  """Folds `data` into a key of rows; its words are `[2 of threefry, rows]`."""
  folded = jax.random.fold_in(_threefry(words), data)
  return jnp.concatenate([jax.random.key_data(folded), words[2:]])


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Splits a key of rows into keys of the same rows, `[*shape, 4]`."""
  keys = jax.random.key_data(jax.random.split(_threefry(words), shape))
  rows = jnp.broadcast_to(words[2:], keys.shape)
  return jnp.concatenate([keys, rows], axis=-1)


def _refuse(*_) -> NoReturn:
  raise UserError(
    'accumulate_steps > 1: random numbers of a micro-batch would not be those '
    'of the batch; only nanomoe.ops.dropout is allowed, or accumulate_steps=1'
  )


_OF_ROWS = extend.define_prng_impl(
  key_shape=(4,),
  seed=_refuse,
  split=_split,
  random_bits=_refuse,
  fold_in=_fold_in,
  name='key_of_rows',
  tag='rows',
)


def dropout(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
  """Zeroes elements with probability `rate` and rescales the others.

  Srivastava et al. 2014. The expectation is exactly the input.

  Args:
    x: Activations; axis 0 is the batch.
    key: Random key, as in `keep_mask`.
    rate: Probability of dropping an element.
  """
  mask, keep = keep_mask(key, rate, x.shape)
  return jnp.where(mask, x * (1 / keep), 0.0)


class Dropout(nn.Module):
  """Dropout layer, with keys of the stream 'dropout'.

  Attributes:
    rate: Probability of dropping an element; 0 disables dropout.
  """

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    """Returns x, with elements dropped in training."""
    if not train or self.rate == 0.0:
      return x
    return dropout(x, self.make_rng('dropout'), self.rate)
