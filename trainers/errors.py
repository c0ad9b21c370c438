"""Errors for users, and exceptions that end or undo a step."""

from collections.abc import Sequence

# Exit codes.
USER_ERROR = 2
INTERRUPTED = 75


class UserError(Exception):
  """Error that a user can correct, with one line for each problem; exit code 2.

  Args:
    problems: One problem, or several.

  Attributes:
    problems: Lines that say where the problem is, what is wrong, and what is
      allowed.
  """

  def __init__(self, problems: str | Sequence[str]):
    self.problems = [problems] if isinstance(problems, str) else list(problems)
    super().__init__('\n'.join(self.problems))

  def _render_traceback_(self) -> list[str]:
    """Returns the lines that IPython shows instead of a traceback."""
    return [f'error: {line}' for line in self.problems]


class PeerError(Exception):
  """Error: another process of the run failed.

  Args:
    text: Message, which names the process.
    code: Exit code of this process.
  """

  def __init__(self, text: str, code: int = 1):
    self.code = code
    super().__init__(text)


class Interrupted(Exception):
  """Exception of a long action that polls after SIGTERM or Ctrl-C arrived."""


class NotFinite(FloatingPointError):
  """A NaN or an infinity that JAX was asked to find: one line, exit code 3."""


class RollBack(Exception):
  """Exception of a hook that returns the run to its newest good checkpoint."""


def is_out_of_memory(error: BaseException) -> bool:
  """Returns whether memory of the host or of a device ran out.

  XLA has one class for all its errors: their text gives the reason.

  Args:
    error: Any error.
  """
  words = ('RESOURCE_EXHAUSTED', 'Out of memory', 'bad_alloc')
  return isinstance(error, MemoryError) or (
    isinstance(error, RuntimeError) and any(w in str(error) for w in words)
  )


def first_line(error: BaseException) -> str:
  """Returns the first line of the message of `error`, or its repr if empty."""
  return next(iter(str(error).splitlines()), '') or repr(error)
