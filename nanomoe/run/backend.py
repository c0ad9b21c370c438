"""Start of JAX, with one line for a bad environment variable."""

import contextlib
import os
import pathlib
import re
import signal
import sys
import warnings

from trainers.errors import UserError, first_line, is_out_of_memory

_CACHE = 'JAX_COMPILATION_CACHE_DIR'
# Variables that decide which devices there are.
_OF_DEVICES = (
  'JAX_PLATFORMS',
  'JAX_PLATFORM_NAME',
  'JAX_NUM_CPU_DEVICES',
  'JAX_DEFAULT_DEVICE',
)


def import_jax() -> None:
  """Imports JAX, without its devices.

  Raises:
    UserError: An environment variable of JAX or XLA has a bad value.
  """
  if 'jax' not in sys.modules:
    _check_xla_flags()
  _check_cache()
  try:
    import jax  # noqa: F401, PLC0415 (it takes seconds)
  except ValueError as error:  # JAX reads its variables when it is imported.
    text = first_line(error)
    flags = text.lower().replace('jax.', 'jax_')
    names = [
      name
      for name in os.environ
      if name.startswith('JAX_') and name.lower() in flags
    ]
    if not names:
      raise
    raise UserError(f'{_shown(names)}: {text}') from error


def start() -> None:
  """Imports JAX and initializes its devices.

  Commands call it before they make a directory.

  Raises:
    UserError: An environment variable of JAX or XLA has a bad value, or there
      is no such device.
  """
  import_jax()
  import jax  # noqa: PLC0415 (it takes seconds)

  try:
    jax.devices()
    jax.device_put(0)
  except Exception as error:
    if is_out_of_memory(error):
      raise
    names = [name for name in _OF_DEVICES if os.environ.get(name)]
    if 'device_count' in os.environ.get('XLA_FLAGS', ''):
      names.append('XLA_FLAGS')
    text = 'JAX found no device of this platform'
    if isinstance(error, RuntimeError | ValueError):  # Else one of its bugs.
      text = first_line(error)
    if 'JAX_PLATFORMS' not in text:
      text += "; JAX_PLATFORMS='' lets JAX choose, and 'cpu' is always there"
    raise UserError(f'{_shown(names) or "JAX"}: {text}') from error


def _shown(names: list[str]) -> str:
  return ' '.join(f'{name}={os.environ[name]!r}' for name in names)


def _check_cache() -> None:
  """Raises UserError if compiled programs cannot be kept where they should."""
  value = os.environ.get(_CACHE)
  if not value or '://' in value:  # None, or a bucket of a cloud.
    return
  try:
    pathlib.Path(value).mkdir(parents=True, exist_ok=True)
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{_CACHE}={value!r}: {reason}; it must be a directory, or empty for no '
      'cache'
    ) from error


def _check_xla_flags() -> None:
  """Raises UserError if XLA cannot read XLA_FLAGS.

  XLA ends the process then, so a child process reads them first.
  """
  value = os.environ.get('XLA_FLAGS', '')
  if not value:
    return
  from jaxlib import xla_client  # noqa: PLC0415 (JAX needs it anyway)

  reader, writer = os.pipe()
  with warnings.catch_warnings():
    # Python 3.12 warns of threads. The child has none of their locks to take.
    warnings.simplefilter('ignore', DeprecationWarning)
    child = os.fork()
  if not child:
    try:
      signal.set_wakeup_fd(-1)  # Its other end is the parent's.
      os.dup2(writer, 2)
      _ = xla_client.CompileOptions().executable_build_options.debug_options
    finally:
      os._exit(0)
  os.close(writer)
  with open(reader, encoding='utf-8', errors='replace') as file:
    text = file.read()
  with contextlib.suppress(ChildProcessError):  # SIGCHLD may be ignored.
    os.waitpid(child, 0)
  # Its log has lines such as `F1122 11:22:33.444555 123 file.cc:45] Unknown`:
  # an error (E) may say more than the fatal line (F) after it.
  messages = re.findall(r'^([EF])\d{4} .*?\.cc:\d+\] (.*)', text, re.MULTILINE)
  if any(level == 'F' for level, _ in messages):
    raise UserError(f'XLA_FLAGS={value!r}: {messages[0][1]}')
