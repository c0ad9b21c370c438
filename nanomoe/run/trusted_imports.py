"""Trusted import paths: plug-ins that a run's config.json may import.

A config.json is data and may come from another user. A `type` that is an import
path would run code when it is built. Such a path is imported only if the user
has named it before: in a --config file, as --config.KEY.type=PATH, or by
--allow_imports=PATH. A file in the user's state directory stores these paths.
"""

from collections.abc import Collection, Mapping
import contextlib
import pathlib
from typing import Any

from absl import flags

from nanomoe.config import home, schema
from trainers.errors import UserError

# Types that a command builds to read a trained model.
OF_A_MODEL = (
  'data.tokenizer.type',
  'data.dataset.type',
  'model.attention.type',
  'moe.router.type',
)


def define_flag(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines the flag --allow_imports in `values` and returns its holder."""
  return flags.DEFINE_list(
    'allow_imports',
    [],
    "Comma-separated import paths of plug-ins that the run's config.json may "
    'import. Paths that you have used before are always allowed.',
    flag_values=values,
  )


def paths(
  config: Mapping[str, Any], keys: Collection[str] | None = None
) -> set[str]:
  """Returns the import paths in `config`, which are the types with a dot.

  Args:
    config: Config of a run.
    keys: Dotted keys to search, such as 'moe.router.type'; None searches all.
  """
  return {
    value
    for key, value in schema.flatten(config)
    if key.endswith('.type')
    and isinstance(value, str)
    and '.' in value
    and (keys is None or key in keys)
  }


def check(named: set[str], allowed: Collection[str]) -> None:
  """Checks that import paths are trusted, and remembers them.

  Args:
    named: Import paths in a config.json.
    allowed: Import paths that the user allows.

  Raises:
    UserError: A path is neither allowed nor used before.
  """
  untrusted = sorted(named - set(allowed) - _known())
  if untrusted:
    raise UserError(
      f'config.json: it imports plug-ins that you have not used before, '
      f'{", ".join(untrusted)}; to trust them, add '
      f'--allow_imports={",".join(untrusted)}'
    )
  remember(named)


def remember(named: set[str]) -> None:
  """Stores import paths as trusted, or nothing if the file is not writable."""
  new = sorted(named - _known())
  if not new:
    return
  with contextlib.suppress(OSError, UserError):
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open('a', encoding='utf-8', errors='replace') as file:
      file.write(''.join(f'{name}\n' for name in new))


def _known() -> set[str]:
  try:
    text = _file().read_text(encoding='utf-8', errors='replace')
  except (OSError, UserError):  # No file yet, or no home directory.
    return set()
  return set(text.splitlines())


def _file() -> pathlib.Path:
  base = home.variable('XDG_STATE_HOME', '~/.local/state')
  return pathlib.Path(base) / 'nanomoe' / 'imports.txt'
