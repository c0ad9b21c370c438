"""Whose code a run's own files may name: what this user has named before.

config.json is data: it may come from somebody else. A `type` in it that is an
import path would run code when it is built. So it is imported only if this user
has named it: in a --config file, as --config.KEY.type=PATH, or by
--allow_imports=PATH. That is remembered, by its path, for the runs to come.
"""

from collections.abc import Collection, Mapping
import contextlib
import os
import pathlib
from typing import Any

from absl import flags

from nanomoe.config import schema
from trainers.errors import UserError

# What a command that reads a trained model builds of its config.
OF_A_MODEL = (
  'data.tokenizer.type',
  'data.dataset.type',
  'model.attention.type',
  'moe.router.type',
)


def define_flag(values: flags.FlagValues) -> flags.FlagHolder:
  return flags.DEFINE_list(
    'allow_imports',
    [],
    "Import paths, with commas between, that a run's own config.json may name "
    'besides those that you have used before.',
    flag_values=values,
  )


def paths(
  config: Mapping[str, Any], keys: Collection[str] | None = None
) -> set[str]:
  """The import paths in `config`: types with a dot; of `keys` alone, if any."""
  return {
    value
    for key, value in schema.flatten(config)
    if key.endswith('.type')
    and isinstance(value, str)
    and '.' in value
    and (keys is None or key in keys)
  }


def check(named: set[str], allowed: Collection[str]) -> None:
  """Raises UserError if `named` by data, and neither allowed nor known."""
  strangers = sorted(named - set(allowed) - _known())
  if strangers:
    raise UserError(
      f'config.json names code that you have not used before: '
      f'{", ".join(strangers)}; if you trust it, add '
      f'--allow_imports={",".join(strangers)}'
    )
  remember(named)


def remember(named: set[str]) -> None:
  """Where it cannot be kept, it has to be named again."""
  new = sorted(named - _known())
  if not new:
    return
  with contextlib.suppress(OSError, RuntimeError):
    path = _file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.open('a', encoding='utf-8', errors='replace') as file:
      file.write(''.join(f'{name}\n' for name in new))


def _known() -> set[str]:
  try:
    text = _file().read_text(encoding='utf-8', errors='replace')
  except (OSError, RuntimeError):  # None yet, or no home.
    return set()
  return set(text.splitlines())


def _file() -> pathlib.Path:
  base = os.environ.get('XDG_STATE_HOME') or '~/.local/state'
  return pathlib.Path(base).expanduser() / 'nanomoe' / 'imports.txt'
