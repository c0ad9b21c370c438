"""The cache directory of the user: texts, tokens and compiled programs."""

import contextlib
import hashlib
import os
import pathlib
import platform
import warnings

from nanomoe.config import home
from trainers.errors import UserError

_MIN_SECONDS = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'
_LEAST = '0.1'  # JAX's default of 1 omits most programs of a small model.


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
  elif path := _programs():
    os.environ[name] = str(path)
    os.environ.setdefault(_MIN_SECONDS, _LEAST)


def keep_programs_of_this_process() -> None:
  """Does the same in a process of the user, after the import of JAX.

  The environment stays as it is, and so does a cache that the user has set.
  """
  import jax  # noqa: PLC0415 (it takes seconds)

  name = 'JAX_COMPILATION_CACHE_DIR'
  is_set = name in os.environ or jax.config.values[name.lower()]
  if not is_set and (path := _programs()):
    jax.config.update(name.lower(), str(path))
    if _MIN_SECONDS not in os.environ:
      jax.config.update(_MIN_SECONDS.lower(), float(_LEAST))


def _programs() -> pathlib.Path | None:
  """Makes and returns the directory of programs; None if that is impossible."""
  # On a full disk, or after a kill during a write, the program is compiled.
  warnings.filterwarnings('ignore', r'Error \w+ persistent compilation cache')
  try:
    path = directory() / f'xla-{_cpu_fingerprint()}'
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
  except (OSError, UserError):  # No home, or one that cannot be written.
    return None
  return path if os.access(path, os.W_OK | os.X_OK) else None


def _cpu_fingerprint() -> str:
  """Returns 12 hexadecimal digits that differ between instruction sets."""
  kinds = ('model name', 'flags', 'Features', 'CPU part')  # Of x86, and ARM.
  words = [platform.system(), platform.machine()]
  with contextlib.suppress(OSError):  # Not Linux.
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    words += sorted({line for line in lines if line.startswith(kinds)})
  return hashlib.sha256('\n'.join(words).encode()).hexdigest()[:12]
