"""Work in pieces whose intermediate results stay in a core's cache."""

import jax

# Of intermediate results: about two cores' second-level caches.
CACHE_BYTES = 4 << 20


def at_once(piece_bytes: int, num_pieces: int) -> int:
  """How many of `num_pieces` to compute at once: a divisor.

  On CPUs, those whose intermediate results, `piece_bytes` each, stay in the
  cache: writing them to memory and reading them costs more than many a product.
  Elsewhere all.
  """
  if jax.default_backend() != 'cpu':
    return num_pieces
  at_most = min(max(CACHE_BYTES // piece_bytes, 1), num_pieces)
  return next(n for n in range(at_most, 0, -1) if num_pieces % n == 0)
