"""The table of config keys that --help prints."""

from collections.abc import Iterable, Mapping
import textwrap
from typing import Any

from nanomoe.config.schema import (
  ARGUMENTS,
  FIELDS,
  SPEC_GROUPS,
  SPECS,
  flatten,
)


def keys(config: Mapping[str, Any] | None = None) -> str:
  """Returns every key with its meaning, and its value in `config` if given."""
  rows = [(name, f'{f.meaning}; {f.allowed}') for name, f in FIELDS.items()]
  rows += [(f'{name}.type', spec.meaning) for name, spec in SPECS.items()]
  rows += [(f'{k}.NAME.type', spec.meaning) for k, spec in SPEC_GROUPS.items()]
  rows += list(ARGUMENTS.items())
  values = dict(flatten(config or {}))
  return columns(
    (name, f'{text} [{values[name]!r}]' if name in values else text)
    for name, text in rows
  )


def columns(rows: Iterable[tuple[str, str]]) -> str:
  """Returns names with their descriptions beside them, in 80 columns."""
  return '\n'.join(
    textwrap.fill(
      text,
      80,
      initial_indent=f'  {name:25} ',
      subsequent_indent=' ' * 28,
      break_on_hyphens=False,
    )
    for name, text in rows
  )
