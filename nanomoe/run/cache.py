"""The cache directory of the user: texts, tokens and compiled programs."""

import contextlib
import hashlib
import os
import pathlib
import platform
import warnings

from nanomoe.config import home
from trainers.errors import UserError


def directory() -> pathlib.Path:
  """Returns the directory of NanoMoE in the cache of the user.

  Raises:
    UserError: The user has no home directory.
  """
  try:
    base = pathlib.Path(home.variable('XDG_CACHE_HOME', '~/.cache'))
  except UserError as error:
    raise UserError(
      'there is no home directory to keep files in: set XDG_CACHE_HOME '
      f'({error})'
    ) from error
  return base / 'nanomoe'


def keep_compiled_programs() -> None:
  """Lets JAX keep compiled programs, so that a second start compiles nothing.

  The directory is one per kind of CPU, because programs hold its instructions.
  A JAX_COMPILATION_CACHE_DIR that is set, also to '', stays.
  """
  name = 'JAX_COMPILATION_CACHE_DIR'
  if name in os.environ:
    os.environ[name] = home.variable(name)  # JAX does not expand `~`.
    return
  try:
    path = directory() / f'xla-{_cpu_fingerprint()}'
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path, os.W_OK | os.X_OK):
      return
  except (OSError, UserError):  # No home, or one that cannot be written.
    return
  os.environ[name] = str(path)
  # In seconds: JAX's default of 1 omits most programs of a small model.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  # On a full disk, or after a kill during a write, the program is compiled.
  warnings.filterwarnings('ignore', r'Error \w+ persistent compilation cache')


def _cpu_fingerprint() -> str:
  """Returns 12 hexadecimal digits that differ between instruction sets."""
  kinds = ('model name', 'flags', 'Features', 'CPU part')  # Of x86, and ARM.
  words = [platform.system(), platform.machine()]
  with contextlib.suppress(OSError):  # Not Linux.
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    words += sorted({line for line in lines if line.startswith(kinds)})
  return hashlib.sha256('\n'.join(words).encode()).hexdigest()[:12]
