"""Policy of resumed runs: the config keys that may change."""

from collections.abc import Collection
import logging

from nanomoe.config.schema import (
  FIELDS,
  SPECS,
  Config,
  Resume,
  flatten,
  policy,
)
from trainers.errors import UserError

log = logging.getLogger(__name__)

# Names that --allow_changed takes. The text itself is recorded by its SHA-256.
ALLOWABLE = tuple(
  dict.fromkeys(
    field.allow for field in (*SPECS.values(), *FIELDS.values()) if field.allow
  )
)


def resume_config(
  old: Config,
  new: Config,
  asked: Collection[str],
  allow_changed: Collection[str] = (),
) -> Config:
  """Returns `new` with what `old` had resolved from 'auto'; logs the changes.

  Args:
    old: Config of the run.
    new: Config to resume with.
    asked: Keys that the command line names. Other differences come from a
      config file.
    allow_changed: Names in `ALLOWABLE`.

  Raises:
    UserError: A line for each key that must not change within a run, or not
      unless the command line names it.
  """
  before = dict(flatten(old.to_dict()))
  after = dict(flatten(new.to_dict()))
  resolved = new.copy_and_resolve_references()
  for name, field in FIELDS.items():
    if 'auto' in field.choices and after[name] == 'auto' and before.get(name):
      after[name] = before[name]
      with resolved.unlocked():
        resolved.update_from_flattened_dict({name: before[name]})
  changed = {
    name: (before.get(name), after.get(name))
    for name in {**before, **after}
    if before.get(name) != after.get(name)
  }
  lines = [
    f'{name} was {was!r} in this run, and is {now!r} now: {objection}'
    for name, (was, now) in changed.items()
    if (objection := _objection(name, asked, allow_changed))
  ]
  if lines:
    raise UserError(lines)
  for name, (was, now) in changed.items():
    log.info('changed: %s from %r to %r', name, was, now)
  return resolved


def _objection(
  name: str, asked: Collection[str], allow_changed: Collection[str]
) -> str:
  """Returns why the key `name` must not change, or ''."""
  declared = policy(name)
  allow = declared.allow if declared else ''
  resume = declared.resume if declared else Resume.FIXED
  if resume is Resume.FREE or allow in allow_changed:
    return ''
  if resume is Resume.FIXED:
    hint = f', or --allow_changed={allow}' if allow else ''
    return f'choose another --workdir{hint}'
  # A new type brings arguments of its own.
  sections = [k.removesuffix('type') for k in asked if k.endswith('.type')]
  if name in asked or name.startswith(tuple(sections)):
    return ''
  return f'to change it, give --config.{name}; to keep it, leave out --config'
