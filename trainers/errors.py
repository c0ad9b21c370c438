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


class NotFinite(FloatingPointError):
  """A NaN or an infinity that JAX was asked to find: one line, exit code 3."""


class RollBack(Exception):
  """A hook wants the newest good checkpoint back: raised to undo the steps."""


def is_out_of_memory(error: BaseException) -> bool:
  """Whether memory, of the host or of a device, ran out.

  XLA's errors have one class for all reasons: the text tells.
  """
  words = ('RESOURCE_EXHAUSTED', 'Out of memory', 'bad_alloc')
  return isinstance(error, MemoryError) or (
    isinstance(error, RuntimeError) and any(w in str(error) for w in words)
  )
