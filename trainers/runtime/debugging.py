"""Support for JAX_DEBUG_NANS, JAX_DEBUG_INFS and JAX_DISABLE_JIT."""

from collections.abc import Iterator
import contextlib

import jax

from trainers.errors import NotFinite

# Packages whose lines do not tell a user where a value comes from.
_LIBRARIES = ('flax', 'jax', 'jaxlib', 'optax')


def finds_nans() -> bool:
  """Returns whether JAX raises for NaN or infinity: `JAX_DEBUG_NANS`."""
  return bool(
    jax.config.values['jax_debug_nans'] or jax.config.values['jax_debug_infs']
  )


def needs_python() -> bool:
  """Returns whether JAX needs a function itself, not its compiled program.

  JAX calls the function operation by operation: always under
  `JAX_DISABLE_JIT`, and after a NaN to find the operation that produced it.
  """
  return bool(jax.config.values['jax_disable_jit']) or finds_nans()


@contextlib.contextmanager
def checked() -> Iterator[None]:
  """Has JAX look for NaN within the context, if it was asked to at all.

  JAX 0.10 no longer looks in a thread in which `with jax.debug_nans(False)`
  has ended, as it does within `jnp.median`, unless a context says so again.
  """
  with contextlib.ExitStack() as stack:
    if jax.config.values['jax_debug_nans']:
      stack.enter_context(jax.debug_nans(True))
    if jax.config.values['jax_debug_infs']:
      stack.enter_context(jax.debug_infs(True))
    yield


def located(error: BaseException, after: str = '') -> BaseException:
  """Returns JAX's error of a NaN as one line that names its place.

  Every other error is returned unchanged.

  Args:
    error: The error that was raised.
    after: What was done before, such as 'after step 3'.
  """
  if not isinstance(error, FloatingPointError) or not finds_nans():
    return error
  if isinstance(error, NotFinite):
    return error
  flag = 'NANS' if jax.config.values['jax_debug_nans'] else 'INFS'
  what = str(error).splitlines()[0]
  if 'de-optimized' in what:
    what = 'a compiled function returned an invalid value, and no operation of '
    what += 'it does by itself'
  parts = [f'JAX_DEBUG_{flag}', after, what + _place(error)]
  found = NotFinite(': '.join(part for part in parts if part))
  found.__cause__ = error
  return found


def _place(error: BaseException) -> str:
  """The innermost line outside of the libraries."""
  place, trace = '', error.__traceback__
  while trace:
    frame = trace.tb_frame
    if frame.f_globals.get('__name__', '').split('.')[0] not in _LIBRARIES:
      code = frame.f_code
      place = f', at {code.co_filename}:{trace.tb_lineno} in {code.co_name}'
    trace = trace.tb_next
  return place
