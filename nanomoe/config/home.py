"""Expansion of `~` in paths of the user."""

import os

from trainers.errors import UserError


def expand(path: str, key: str) -> str:
  """Returns `path` with a leading `~` or `~user` as that home directory.

  A shell expands `~` only at the start of a word, so `--workdir=~/run` reaches
  the command unchanged.

  Args:
    path: Path as given.
    key: Flag, config key or variable of the path, for errors.

  Raises:
    UserError: The home directory is unknown.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith('~'):
    raise UserError(
      f'{key}={path!r}: the home directory of {path.partition("/")[0]!r} is '
      f'unknown; ./{path} is a file of this name'
    )
  return expanded


def variable(name: str, default: str = '') -> str:
  """Returns the path in an environment variable, with `~` expanded.

  Args:
    name: Name of the variable.
    default: Path if the variable is unset or empty.

  Raises:
    UserError: The home directory is unknown.
  """
  return expand(os.environ.get(name) or default, f'${name}')
