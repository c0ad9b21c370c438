"""What every command does: flags, one line for a mistake, exit codes."""

from collections.abc import Callable
import contextlib
import errno
import hashlib
import io
import logging
import os
import pathlib
import platform
import re
import signal
import sys
from typing import Any, TextIO, cast
import warnings

from absl import app, flags

import nanomoe
from nanomoe import terminal, tilde
from nanomoe.data import corpus
from trainers.errors import NotFinite, UserError, is_out_of_memory
from trainers.signals import RaisingInterrupt

log = logging.getLogger(__name__)

USER_ERROR = 2
# Full, too large, read-only, broken: no bug of ours.
_DISK = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EIO,
)
# As of a run that diverged.
NOT_FINITE = 3
INTERRUPTED = 75


def parse_flags(
  argv: list[str],
  values: flags.FlagValues,
  usage: str | None,
  more_help: Callable[[], str] = str,
) -> None:
  """Sets a command's own flags from argv, which must hold nothing else.

  --help prints `usage`, the flags and `more_help()`, and exits.

  Raises:
    UserError: an unknown flag, a bad value, or a stray word.
  """
  if {'--help', '-help', '-h'} & set(argv):
    parts = (usage or '').strip(), _flags_help(values), more_help()
    show('\n\n'.join(part for part in parts if part) + '\n')
    sys.exit(0)
  try:
    rest = values(argv)
  except flags.Error as error:
    raise UserError(str(error)) from error
  if rest[1:]:
    raise UserError(f'what is {rest[1]!r}? Options are --name=value')


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


def run(main: Callable[[Any], int], parse: Callable[[list[str]], Any]) -> None:
  """Exits with main(parse(sys.argv)), or with 2 and a line for each mistake.

  A command has FlagValues of its own: absl's global ones cannot hold those of
  two commands, and a notebook imports several.
  """
  terminal.open_closed_streams()
  _refuse_a_namespace()
  is_process = _is_process_of(main)
  if is_process:
    _exec_with_huge_pages()
  before = sys.stdout, sys.stderr, sys.unraisablehook
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      # What its encoding lacks is escaped: a line with a ★ is not lost.
      stream.reconfigure(errors='backslashreplace')
  outputs = terminal.Output(sys.stdout), terminal.Output(sys.stderr)
  sys.stdout, sys.stderr = (cast(TextIO, output) for output in outputs)
  sys.unraisablehook = _tell_unraisable
  _guarded(lambda _: _keep_compiled_programs())(None)

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
  finally:
    for output in outputs:
      output.close_quietly()
    if not is_process:  # A notebook, for example, that goes on.
      sys.stdout, sys.stderr, sys.unraisablehook = before


def _refuse_a_namespace() -> None:
  """Exits if a directory nanomoe/ hides the package, but not its modules.

  An editable installation still finds those. Without the package's __init__,
  CLU would look for TensorFlow.
  """
  if getattr(nanomoe, '__file__', None) is None:
    place = next(iter(nanomoe.__path__))
    print(
      f'error: the directory {place} hides the package nanomoe: rename it, or '
      'use python -P -m',
      file=sys.stderr,
    )
    sys.exit(USER_ERROR)


def _flags_help(values: flags.FlagValues) -> str:
  """A command's own flags, in the order of their definition."""
  rows = []
  for module, of_module in values.flags_by_module_dict().items():
    for flag in of_module if module != 'absl.flags' else ():
      name = f'-{flag.short_name}, ' if flag.short_name else ''
      text = str(flag.help).partition(';\n')[0]  # Absl adds to what repeats.
      if flag.default is not None and flag.default is not False:
        listed = isinstance(flag.default, list)
        default = ' '.join(map(repr, flag.default)) if listed else flag.default
        text = f'{text} [{default}]'
      rows.append((f'{name}--{flag.name}', text))
  return terminal.columns([*rows, ('-h, --help', 'This.')])


def _guarded(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
  def guarded(argument):
    try:
      return fn(argument)
    except UserError as error:
      for line in error.problems:
        print(f'error: {line}', file=sys.stderr)
        log.debug('error: %s', line)
      sys.exit(USER_ERROR)
    except KeyboardInterrupt as error:
      print(f'interrupted by {str(error) or "Ctrl-C"}', file=sys.stderr)
      sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `| head`, for example, has seen enough.
      sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
      log.debug('a bug', exc_info=True)
      if is_out_of_memory(error):
        print(f'error: out of memory: {error}', file=sys.stderr)
        sys.exit(USER_ERROR)
      if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or 'what was to be written'
        print(f'error: {where}: {error.strerror}', file=sys.stderr)
        sys.exit(USER_ERROR)
      if isinstance(error, FloatingPointError):
        _tell_not_finite(error)
      raise

  return guarded


def _tell_not_finite(error: FloatingPointError) -> None:
  """Exits with a line that names the place, if JAX was asked to look for it."""
  from trainers import debugging  # noqa: PLC0415 (JAX takes seconds)

  found = debugging.located(error)
  if found is not error or isinstance(error, NotFinite):
    print(f'error: {found}', file=sys.stderr)
    sys.exit(NOT_FINITE)


def _tell_unraisable(unraisable: Any) -> None:
  """But for the arrays that a failed save leaves behind: it is told itself."""
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _is_process_of(main: Callable[[Any], int]) -> bool:
  """Whether this process is `python [options] -m MODULE`, with main's module.

  False where another program runs the module: a notebook, runpy in a script, a
  debugger, a profiler. Nothing may start that program a second time.
  """
  names = getattr(main, '__globals__', {})
  spec = names.get('__spec__')
  monitoring = getattr(sys, 'monitoring', None)  # From Python 3.12 on.
  return not (
    spec is None
    or names is not vars(sys.modules['__main__'])
    or spec.name != _module_in(sys.orig_argv)
    or sys.flags.inspect
    or sys.gettrace()
    or sys.getprofile()
    or (monitoring and any(monitoring.get_tool(i) for i in range(6)))
  )


def _module_in(words: list[str]) -> str | None:
  """Returns MODULE of `python [options] -m MODULE ...`, None if there is none.

  Options may be joined, as in `-OOm MODULE`; -c, -m, -W and -X have a value.
  """
  options = iter(words[1:])
  for word in options:
    if word == '--check-hash-based-pycs':
      next(options, None)
    if word.startswith('--'):
      continue
    match = re.fullmatch('-([^cmWX]+|[^cmWX]*([cmWX])(.*))', word, re.DOTALL)
    if not match or match[2] == 'c':
      return None  # A script, or its text.
    value = match[3] or (match[2] and next(options, None))
    if match[2] == 'm':
      return value
  return None


def _exec_with_huge_pages() -> None:
  """Starts this process again, once, with an allocator that suits XLA.

  Large buffers then come in huge pages: a fault for 2 MB instead of 4 kB; the
  faults are a large part of a step's time. glibc reads its tunables only at the
  start.
  """
  is_set = 'GLIBC_TUNABLES' in os.environ
  if sys.platform == 'linux' and sys.executable and not is_set:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    with contextlib.suppress(OSError):  # Training is slower without it.
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_compiled_programs() -> None:
  """Lets JAX keep what it compiles: a second start then compiles nothing.

  In the user's cache directory, one for each kind of CPU: programs hold its
  instructions. A JAX_COMPILATION_CACHE_DIR that is set, also to '', stands.
  """
  name = 'JAX_COMPILATION_CACHE_DIR'
  if name in os.environ:
    os.environ[name] = tilde.variable(name)  # JAX does not expand `~`.
    return
  try:
    path = corpus.cache_directory() / f'xla-{_cpu_fingerprint()}'
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path, os.W_OK | os.X_OK):
      return
  except (OSError, UserError):  # No home, or one that cannot be written.
    return
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(path)
  # Seconds; JAX's own 1 leaves out most programs of a small model.
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  # A full disk, or a file that kill -9 left half written: it is compiled then.
  warnings.filterwarnings('ignore', r'Error \w+ persistent compilation cache')


def _cpu_fingerprint() -> str:
  """12 hexadecimal digits that differ where CPUs have other instructions."""
  kinds = ('model name', 'flags', 'Features', 'CPU part')  # Of x86, and ARM.
  words = [platform.system(), platform.machine()]
  with contextlib.suppress(OSError):  # Not Linux.
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    words += sorted({line for line in lines if line.startswith(kinds)})
  return hashlib.sha256('\n'.join(words).encode()).hexdigest()[:12]
