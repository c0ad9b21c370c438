"""Flags, error lines and exit codes of all commands."""

from collections.abc import Callable
import errno
import io
import logging
import signal
import sys
from typing import Any, TextIO, cast

from absl import app, flags

import nanomoe
from nanomoe.config import help
from nanomoe.run import cache, peers, process, terminal
from trainers.errors import (
  INTERRUPTED,
  USER_ERROR,
  NotFinite,
  PeerError,
  UserError,
  is_out_of_memory,
)
from trainers.signals import RaisingInterrupt

log = logging.getLogger(__name__)

# Errors of a disk: full, too large a file, read-only, broken.
_DISK = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EIO,
)
NOT_FINITE = 3  # Equal to the exit code of a run that diverged.


def parse_flags(
  argv: list[str],
  values: flags.FlagValues,
  usage: str | None,
  more_help: Callable[[], str] = str,
  takes_words: bool = False,
) -> list[str]:
  """Sets the flags of a command from argv; returns the other words.

  --help prints `usage`, the flags and `more_help()`, and exits.

  Args:
    argv: Words of the command line.
    values: Flags of the command.
    usage: First lines of the help.
    more_help: Returns further lines of the help.
    takes_words: Whether there may be words that are no flags.

  Raises:
    UserError: There is an unknown flag, a bad value or an unexpected word.
  """
  if {'--help', '-help', '-h'} & set(argv):
    parts = (usage or '').strip(), _flags_help(values), more_help()
    show('\n\n'.join(part for part in parts if part) + '\n')
    sys.exit(0)
  try:
    rest = values(argv)
  except flags.Error as error:
    raise UserError(' '.join(str(error).split())) from error
  if rest[1:] and not takes_words:
    raise UserError(
      f'unexpected argument {rest[1]!r}; options have the form --name=value'
    )
  return rest[1:]


def define_workdir(values: flags.FlagValues) -> flags.FlagHolder:
  """Defines --workdir of a command that reads a run."""
  return flags.DEFINE_string(
    'workdir', None, 'Directory of the run.', required=True, flag_values=values
  )


def define_step(
  values: flags.FlagValues, default: str = 'best'
) -> flags.FlagHolder:
  """Defines --step of a command that reads a checkpoint."""
  return flags.DEFINE_string(
    'step',
    default,
    'Step of the checkpoint: a number, best or latest.',
    flag_values=values,
  )


def show(text: str) -> None:
  """Writes a command's result on standard output, at once.

  Raises:
    BrokenPipeError: The reader of the output has left.
    UserError: The output cannot be written.
  """
  try:
    sys.stdout.write(text)
    sys.stdout.flush()
    if error := getattr(sys.stdout, 'error', None):
      raise error
  except BrokenPipeError:
    raise
  except OSError as error:
    raise UserError(f'standard output: {error.strerror}') from error


def run(
  main: Callable[[Any], int],
  parse: Callable[[list[str]], Any],
  entry: Callable[..., Any] | None = None,
) -> None:
  """Exits with main(parse(sys.argv)), or with 2 and a line for each mistake.

  Each command has FlagValues of its own: the global ones of absl cannot hold
  the flags of two commands, and a notebook imports several.

  Args:
    main: Runs the command; returns its exit code.
    parse: Returns the argument of `main`, given the words of the command.
    entry: Function of the module that `python -m` runs, if it is not `main`.
  """
  terminal.open_closed_streams()
  _refuse_a_namespace()
  is_process = process.is_command(entry or main)
  if is_process:
    process.exec_with_huge_pages()
  before = sys.stdout, sys.stderr, sys.unraisablehook
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      # What its encoding lacks is escaped: a line with a ★ is not lost.
      stream.reconfigure(errors='backslashreplace')
  outputs = terminal.Output(sys.stdout), terminal.Output(sys.stderr)
  sys.stdout, sys.stderr = (cast(TextIO, output) for output in outputs)
  sys.unraisablehook = _report_unraisable
  _guarded(lambda _: cache.keep_compiled_programs())(None)

  def parser(argv):
    flags.FLAGS(argv[:1])  # Absl wants them parsed.
    return _guarded(parse)(argv)

  def whole(argument):
    code = main(argument)
    if not outputs[0].is_log:
      show('')
    return code

  try:
    with RaisingInterrupt().listening():  # Until a trainer listens.
      app.run(_guarded(whole), flags_parser=parser)
  except BaseException as error:
    peers.leave(error)
    raise
  finally:
    for output in outputs:
      output.close_quietly()
    if not is_process:  # A notebook, for example, that goes on.
      sys.stdout, sys.stderr, sys.unraisablehook = before


def _refuse_a_namespace() -> None:
  """Exits if a directory nanomoe/ hides the package.

  An editable installation finds the modules even so. Without the __init__ of
  the package, CLU would look for TensorFlow.
  """
  if getattr(nanomoe, '__file__', None) is None:
    place = next(iter(nanomoe.__path__))
    print(
      f'error: the directory {place} hides the package nanomoe: rename it, or '
      'use python -P -m',
      file=sys.stderr,
    )
    sys.exit(USER_ERROR)


def own_flags(values: flags.FlagValues) -> list[flags.Flag]:
  """Returns the flags of a command, without those that absl adds."""
  return [
    flag
    for module, defined in values.flags_by_module_dict().items()
    if module != 'absl.flags'
    for flag in defined
  ]


def _flags_help(values: flags.FlagValues) -> str:
  """Returns the flags of a command, in the order of their definition."""
  rows = []
  for flag in own_flags(values):
    name = f'-{flag.short_name}, ' if flag.short_name else ''
    text = str(flag.help).partition(';\n')[0]  # Absl appends a type.
    if flag.default is not None and flag.default is not False:
      listed = isinstance(flag.default, list)
      default = ' '.join(map(repr, flag.default)) if listed else flag.default
      text = f'{text} [{default}]'
    rows.append((f'{name}--{flag.name}', text))
  return help.columns([*rows, ('-h, --help', 'Prints this help.')])


def _guarded(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """Returns `fn` with errors of the user as lines and exit codes."""

  def guarded(argument):
    try:
      return fn(argument)
    except UserError as error:
      for line in error.problems:
        print(f'error: {line}', file=sys.stderr)
        log.debug('error: %s', line)
      sys.exit(USER_ERROR)
    except PeerError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(error.code)
    except KeyboardInterrupt as error:
      print(f'interrupted by {str(error) or "Ctrl-C"}', file=sys.stderr)
      sys.exit(INTERRUPTED)
    except BrokenPipeError:  # The reader has left, as `head` does.
      sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
      log.debug('a bug', exc_info=True)
      if is_out_of_memory(error):
        print(f'error: out of memory: {error}', file=sys.stderr)
        sys.exit(USER_ERROR)
      if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or 'the output'
        print(f'error: {where}: {error.strerror}', file=sys.stderr)
        sys.exit(USER_ERROR)
      if isinstance(error, FloatingPointError):
        _exit_not_finite(error)
      raise

  return guarded


def _exit_not_finite(error: FloatingPointError) -> None:
  """Exits with a line that names the place, if JAX was asked to find it."""
  from trainers.runtime import debugging  # noqa: PLC0415 (JAX takes seconds)

  found = debugging.located(error)
  if found is not error or isinstance(error, NotFinite):
    print(f'error: {found}', file=sys.stderr)
    sys.exit(NOT_FINITE)


def _report_unraisable(unraisable: Any) -> None:
  """Reports an unraisable error, except for the remains of a failed save."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)
