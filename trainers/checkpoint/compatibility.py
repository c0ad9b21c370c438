"""What makes a run itself: with other data or another seed it is another."""

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
  """Raises UserError with a line for each part of `now` that has changed.

  Those that are `allowed` to are logged.
  """
  lines = []
  for name, value in now.items():
    if saved.get(name) == value:
      continue
    tell = f'{name} was {saved.get(name)!r} in this run, and is {value!r} now'
    if name in allowed:
      log.warning('%s: allowed to change', tell)
    else:
      lines.append(
        f'{tell}; training goes on all the same with --allow_changed={name}'
      )
  if lines:
    raise UserError(lines)
