"""Leaves of a tree by name, their signatures and their fingerprints."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.errors import UserError


def flatten_by_name(tree: Any) -> dict[str, Any]:
  """Returns {'state.params.block_0...': leaf}, independent of container types.

  Args:
    tree: Tree of arrays.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def signatures(arrays: dict[str, Any]) -> dict[str, str]:
  """Returns {name: 'float32[3, 4]'}, the dtype and the shape of each array."""
  return {name: f'{x.dtype.name}{list(x.shape)}' for name, x in arrays.items()}


def on_one_device(signatures: dict[str, str]) -> dict[str, Any]:
  """Returns shapes on the first device.

  Args:
    signatures: Signatures of arrays, as of `signatures`.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  found = {}
  for name, signature in signatures.items():
    dtype, _, shape = signature.partition('[')
    found[name] = jax.ShapeDtypeStruct(
      json.loads(f'[{shape}'), jnp.dtype(dtype), sharding=sharding
    )
  return found


def check_signatures(saved: dict[str, str], wanted: dict[str, str]) -> None:
  """Raises an error if two trees differ in names, dtypes or shapes.

  Args:
    saved: Signatures of the checkpoint.
    wanted: Signatures of the model.

  Raises:
    UserError: They differ. The lines name up to 5 of the differing arrays.
  """
  if saved == wanted:
    return
  names = [n for n in saved | wanted if saved.get(n) != wanted.get(n)]
  lines = [
    f'{name} is {saved.get(name, "missing")} in the checkpoint, '
    f'{wanted.get(name, "missing")} in this model'
    for name in names[:5]
  ]
  if len(names) > 5:
    lines.append(f'... and {len(names) - 5} more')
  if any('64[' in kind for kind in (*saved.values(), *wanted.values())):
    lines.append('JAX_ENABLE_X64=1 makes 64-bit arrays: was it set, or is it?')
  raise UserError(['the checkpoint is of another architecture:', *lines])


def subtree(arrays: dict[str, Any], prefix: str, like: Any) -> Any:
  """Returns the arrays under `prefix`, as a tree.

  Args:
    arrays: Arrays by name, as of `flatten_by_name`.
    prefix: First part of the names, without the dot.
    like: Tree of arrays or shapes that gives the structure.

  Raises:
    UserError: An array is missing, or has another dtype or shape.
  """
  wanted = flatten_by_name(like)
  start = f'{prefix}.'
  found = {
    name.removeprefix(start): x
    for name, x in arrays.items()
    if name.startswith(start)
  }
  check_signatures(signatures(found), signatures(wanted))
  return jax.tree.unflatten(
    jax.tree.structure(like), [found[name] for name in wanted]
  )


def fingerprints(arrays: dict[str, Any]) -> dict[str, str]:
  """Returns a 32-bit hash of each array, in hexadecimal.

  A change of one element always changes the hash. An accelerator computes the
  hashes of its arrays: for 160 MB that takes less time than a copy.

  Args:
    arrays: Arrays by name.
  """
  is_divided = any(
    isinstance(x, jax.Array) and not x.is_fully_replicated
    for x in arrays.values()
  )
  if jax.default_backend() == 'cpu' and not is_divided:
    # NumPy saves compilation; nothing is copied.
    hashes = {n: _of_numpy(np.asarray(x)) for n, x in arrays.items()}
  else:
    hashes = jax.device_get(_of_devices(arrays))
  return {name: f'{int(x):08x}' for name, x in hashes.items()}


def _of_numpy(x: np.ndarray) -> np.uint32:
  words = x.ravel().view(f'uint{8 * min(x.dtype.itemsize, 4)}')
  return _fingerprint(words, np.arange(words.size, dtype=np.uint32))


@jax.jit
def _of_devices(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: _of_device(x) for name, x in arrays.items()}


def _of_device(x: jax.Array) -> jax.Array:
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  kind = f'uint{8 * min(x.dtype.itemsize, 4)}'
  words = jax.lax.bitcast_convert_type(x, kind)
  # The index of each word without a change of shape: nothing of a divided array
  # has to move.
  index = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    stride = jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
    index += stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  return _fingerprint(words, index)


def _fingerprint(words: Any, index: Any) -> Any:
  """Returns the uint32 sum of MurmurHash3's finalizer over words and indices.

  The finalizer is a bijection, so a single change always changes the sum. A sum
  depends on neither the order of its terms nor the number of devices.

  Args:
    words: Bits of an array, as unsigned integers of at most 32 bits.
    index: Index of each word, modulo 2^32.
  """
  h = words.astype(np.uint32) + index * np.uint32(0x9E3779B9)
  h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
  h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
  return (h ^ h >> 16).sum(dtype=np.uint32)
