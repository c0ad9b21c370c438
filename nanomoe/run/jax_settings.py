"""Settings of JAX (`JAX_...` variables) that no run may depend on."""

import logging
from typing import Any

import jax

from trainers.errors import UserError
from trainers.runtime import keys

log = logging.getLogger(__name__)

# What a language model computes must depend on its config alone.
_NUMBERS: dict[str, Any] = {
  'jax_enable_x64': False,
  'jax_default_prng_impl': keys.IMPLEMENTATION,
  'jax_threefry_partitionable': True,
  'jax_random_seed_offset': 0,
  'jax_default_matmul_precision': None,
  'jax_softmax_custom_jvp': False,
  'jax_high_dynamic_range_gumbel': False,
}
# Checks that code must be written for: that of the libraries is not.
_CHECKS: dict[str, Any] = {
  'jax_numpy_rank_promotion': 'allow',
  'jax_numpy_dtype_promotion': 'standard',
  'jax_transfer_guard': 'allow',
  'jax_transfer_guard_host_to_device': 'allow',
  'jax_transfer_guard_device_to_device': 'allow',
  'jax_transfer_guard_device_to_host': 'allow',
  'jax_no_tracing': False,
  'jax_no_execution': False,
}
# Besides the value above: what changes nothing but the output.
_HARMLESS = (None, 'allow', 'log', 'log_explicit', 'warn')


def pin() -> None:
  """Sets what numbers depend on, for the whole process; logs what changes.

  Must be called before any array is made.

  Raises:
    UserError: A setting cannot be changed, as a context manager holds it.
  """
  for reason, pinned in (
    ('it would change the numbers of a run', _NUMBERS),
    ('NanoMoE and its libraries do not pass this check', _CHECKS),
  ):
    for name, value in pinned.items():
      found = jax.config.values.get(name, value)  # Not of each version of JAX.
      if found == value or (pinned is _CHECKS and found in _HARMLESS):
        continue
      jax.config.update(name, value)
      setting = f'{name.upper()}={found}'
      if jax.config.values[name] != value:  # A context manager holds it.
        raise UserError(f'{setting}: {reason}; it must be {value}')
      log.warning('%s is ignored: %s', setting, reason)
  if jax.config.values['jax_disable_jit']:
    log.warning('JAX_DISABLE_JIT=True: nothing is compiled, so steps are slow')
