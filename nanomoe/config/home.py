"""Paths as users write them: `~` is a home directory."""

import os

from trainers.errors import UserError


def expand(path: str, key: str) -> str:
  """Returns `path` with a leading `~` or `~user` as that home directory.

  A shell expands `~` only at the start of a word: `--workdir=~/run` reaches
  the command unchanged.

  Args:
    path: path as it was given.
    key: flag, config key or variable of the path, for the error.

  Raises:
    UserError: the home directory is unknown.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith('~'):
    raise UserError(
      f'{key}={path!r}: the home directory of {path.partition("/")[0]!r} is '
      f'unknown; write ./{path} for a file of this name'
    )
  return expanded


def variable(name: str, default: str = '') -> str:
  """Returns the path in an environment variable, with `~` expanded.

  Raises:
    UserError: the home directory is unknown.
  """
  return expand(os.environ.get(name) or default, f'${name}')
