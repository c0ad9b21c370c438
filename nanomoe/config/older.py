"""Configs of older versions, under the names of this one."""

from collections.abc import Mapping
from typing import Any

from nanomoe.config.schema import FIELDS, SPEC_GROUPS, SPECS


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of an older run with the keys that it lacks.

  A key that the version of the run did not have gets the value by which that
  version behaved; see `Field.absent`. Renamed values get their new names.
  """
  values = rename(config)
  for name, field in FIELDS.items():
    if field.absent is not None:
      *sections, last = name.split('.')
      if sections and _is_new('.'.join(sections)):
        values.setdefault(sections[0], {})
      section = _section(values, sections)
      if section is not None:
        section.setdefault(last, field.absent)
  for name, spec in SPECS.items():
    *sections, last = name.split('.')
    section = _section(values, sections)
    if spec.absent is not None and section is not None:
      section.setdefault(last, {'type': spec.absent})
  return values


def _is_new(section: str) -> bool:
  """Returns whether there are versions that lack every key of a section."""
  fields = [f for n, f in FIELDS.items() if n.rpartition('.')[0] == section]
  return all(field.absent is not None for field in fields)


def rename(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a copy of a config with renamed values under their new names."""
  values: dict[str, Any] = _copy(config)
  for name in FIELDS:
    *sections, last = name.split('.')
    section = _section(values, sections)
    if section is not None and last in section:
      section[last] = renamed(name, section[last])
  specs = [*SPECS]
  for group in SPEC_GROUPS:
    specs += [f'{group}.{n}' for n in _section(values, [group]) or ()]
  for name in specs:
    section = _section(values, name.split('.'))
    if section is not None and 'type' in section:
      section['type'] = renamed(f'{name}.type', section['type'])
  return values


def renamed(name: str, value: Any) -> Any:
  """Returns the new name of a value of the key `name`, or the value itself."""
  if name in FIELDS:
    table = FIELDS[name].renamed
  else:
    section = name.removesuffix('.type')
    spec = SPECS.get(section) or SPEC_GROUPS.get(section.split('.')[0])
    table = spec.renamed if spec and name.endswith('.type') else {}
  if isinstance(value, bool):
    return table.get(str(value).lower(), value)
  if not isinstance(value, str):
    return value
  # An option may spell a boolean as Python does.
  is_bool = value.lower() in ('true', 'false')
  return table.get(value.lower() if is_bool else value, value)


def _section(values: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
  """Returns the section under `names`, or None if there is none."""
  section: Any = values
  for name in names:
    section = section.get(name) if isinstance(section, dict) else None
  return section if isinstance(section, dict) else None


def _copy(values: Any) -> Any:
  if isinstance(values, Mapping):
    return {k: _copy(v) for k, v in values.items()}
  return values
