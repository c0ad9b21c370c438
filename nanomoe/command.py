"""What every command does: flags, one line for a mistake, exit codes."""

from collections.abc import Callable
import os
import signal
import sys
from typing import Any

from absl import app, flags

from trainers.errors import UserError

USER_ERROR = 2
INTERRUPTED = 75


def parse_flags(argv: list[str]) -> list[str]:
  """Absl's flags from argv, which must hold nothing else.

  Raises:
    UserError: an unknown flag, a bad value, or a stray word.
  """
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(str(error)) from error
  if rest[1:]:
    raise UserError(f'what is {rest[1]!r}? Options are --name=value')
  return rest


def run(
  main: Callable[[Any], int],
  parse: Callable[[list[str]], Any] = parse_flags,
) -> None:
  """Exits with main(parse(sys.argv)), or with 2 and a line for each mistake."""
  _exec_with_huge_pages()
  # Until a trainer listens, there is nothing to save.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  app.run(_guarded(main), flags_parser=_guarded(parse))


def _guarded(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
  def guarded(argument):
    try:
      return fn(argument)
    except UserError as error:
      for line in error.problems:
        print(f'error: {line}', file=sys.stderr)
      sys.exit(USER_ERROR)
    except KeyboardInterrupt:
      print('interrupted', file=sys.stderr)
      sys.exit(INTERRUPTED)

  return guarded


def _exec_with_huge_pages() -> None:
  """Starts this process again, once, with an allocator that suits XLA.

  Large buffers then come in huge pages: a fault for 2 MB instead of 4 kB, which
  is a fifth of a step's time. glibc reads its tunables only at the start.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
