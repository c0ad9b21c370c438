"""The errors that a person is meant to read."""

from collections.abc import Sequence


class UserError(Exception):
  """Mistakes of the user, or of the world: one clear line each, exit code 2.

  Attributes:
    problems: What is wrong, where, and what is allowed; a line each.
  """

  def __init__(self, problems: str | Sequence[str]):
    self.problems = [problems] if isinstance(problems, str) else list(problems)
    super().__init__('\n'.join(self.problems))


class Interrupted(Exception):
  """SIGTERM or Ctrl-C arrived: raised where a long action polls for it."""
