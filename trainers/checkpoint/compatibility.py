"""Check that a checkpoint belongs to the run that resumes from it."""

from collections.abc import Collection, Mapping
import logging
from typing import Any

from trainers.errors import UserError

log = logging.getLogger(__name__)


def check(
  saved: Mapping[str, Any],
  now: Mapping[str, Any],
  allowed: Collection[str] = (),
) -> None:
  """Raises an error if facts of a run, such as its data or seed, have changed.

  Changes of facts in `allowed` are logged.

  Args:
    saved: Facts in the checkpoint, by name.
    now: Facts of this start, by name.
    allowed: Names of facts that may change.

  Raises:
    UserError: Facts have changed, one line each.
  """
  lines = []
  for name, value in now.items():
    if saved.get(name) == value:
      continue
    change = f'{name}={value!r}: the run started with {saved.get(name)!r}'
    if name in allowed:
      log.warning('%s; accepted by --allow_changed=%s', change, name)
    else:
      lines.append(f'{change}; --allow_changed={name} accepts the change')
  if lines:
    raise UserError(lines)
