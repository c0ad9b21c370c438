"""Random keys that are the same whatever JAX's settings are."""

from collections.abc import Iterator
import contextlib

import jax
import numpy as np

# JAX's default may be set by JAX_DEFAULT_PRNG_IMPL, which nothing records.
IMPLEMENTATION = 'threefry2x32'


def make(seed: int) -> jax.Array:
  """Returns the key of a seed.

  The key is that of `jax.random.key(seed)` under JAX's default settings.
  `JAX_RANDOM_SEED_OFFSET` would change the latter.

  Args:
    seed: Any integer, of which the lowest 32 bits count.
  """
  data = jax.device_put(np.array([0, seed % 2**32], np.uint32))
  return jax.random.wrap_key_data(data, impl=IMPLEMENTATION)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
  """Draws, within the context, what JAX draws under its default settings."""
  with contextlib.ExitStack() as stack:
    # An equal setting is left alone: entering it would compile programs anew.
    if jax.config.values['jax_default_prng_impl'] != IMPLEMENTATION:
      stack.enter_context(jax.default_prng_impl(IMPLEMENTATION))
    if not jax.config.values['jax_threefry_partitionable']:
      stack.enter_context(jax.threefry_partitionable(True))
    yield
