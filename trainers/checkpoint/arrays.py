"""The leaves of a tree by name: how they look, and whether they are whole."""

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainers.errors import UserError


def flatten_by_name(tree: Any) -> dict[str, Any]:
  """{'state.params.block_0...': leaf}: no container types on the disk."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def signatures(arrays: dict[str, Any]) -> dict[str, str]:
  """{name: 'float32[3, 4]'}."""
  return {name: f'{x.dtype.name}{list(x.shape)}' for name, x in arrays.items()}


def check_signatures(saved: dict[str, str], wanted: dict[str, str]) -> None:
  """Raises UserError, naming what is missing or of another type or shape."""
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
  """The part of `arrays` under `prefix`, as a tree `like` another.

  Raises:
    UserError: naming the arrays that are missing or of another shape.
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
  """{name: 32 bits of its content, in hexadecimal}.

  One changed element always changes them. On an accelerator they are computed
  there: 160 MB take less time than copying them.
  """
  if jax.default_backend() == 'cpu':  # Nothing to copy, and to compile.
    hashes = {n: _fingerprint(np.asarray(x), np) for n, x in arrays.items()}
  else:
    hashes = jax.device_get(_on_device(arrays))
  return {name: f'{int(x):08x}' for name, x in hashes.items()}


@jax.jit
def _on_device(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: _fingerprint(x, jnp) for name, x in arrays.items()}


def _fingerprint(x: Any, numpy: ModuleType) -> Any:
  """uint32: the sum of MurmurHash3's finalizer over the words and places.

  The finalizer is a bijection, so no single change cancels; a sum, so that
  neither the order nor a number of devices matters.
  """
  words = x.ravel().view(f'uint{8 * min(x.dtype.itemsize, 4)}')
  words = words.astype(np.uint32)
  places = numpy.arange(words.size, dtype=np.uint32)
  h = words + places * np.uint32(0x9E3779B9)
  h = (h ^ h >> 16) * np.uint32(0x85EBCA6B)
  h = (h ^ h >> 13) * np.uint32(0xC2B2AE35)
  return (h ^ h >> 16).sum(dtype=np.uint32)
