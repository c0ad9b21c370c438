"""Other processes of a run: what all must share, and how one of them ends."""

from collections.abc import Callable
import faulthandler
import logging
import os
import pathlib
import sys
import threading
import time
import traceback
from typing import Any, TypeVar
import uuid

from trainers.errors import UserError

log = logging.getLogger(__name__)

# Time that the main thread has to close its files after another process failed.
GRACE_SECONDS = 8.0
# Time that process 0 waits for the others if no process reported a failure.
_UNREPORTED_SECONDS = 4.0
# A network file system may show a new file late.
_VISIBLE_SECONDS = 5.0
_MAX_DIFFERENCES = 5

T = TypeVar('T')

_is_leaving = threading.Event()
_codes: list[int] = []  # Exit code of a run that ended on all processes.


def check_equal(facts: dict[str, Any]) -> None:
  """Raises an error on all processes if their facts differ.

  Args:
    facts: JSON values by name.

  Raises:
    UserError: A line for each difference, with the process.
  """
  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  wanted, *others = processes.group('facts').gather(facts)
  lines = [
    f'process {i}: {name}={values.get(name)!r}, but process 0 has '
    f'{wanted.get(name)!r}; it must be the same on all processes'
    for i, values in enumerate(others, 1)
    for name in {**wanted, **values}
    if values.get(name) != wanted.get(name)
  ]
  if more := len(lines) - _MAX_DIFFERENCES:
    lines[_MAX_DIFFERENCES:] = [f'... and {more} more'] if more > 0 else []
  if lines:
    raise UserError(lines)


def check_shared(workdir: pathlib.Path) -> None:
  """Raises an error on all processes if one does not see the workdir.

  Args:
    workdir: Directory of the run, which process 0 has made.

  Raises:
    UserError: A process sees another directory, or none.
  """
  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  group = processes.group('workdir')
  if group.size == 1:
    return

  path = workdir / group.first(lambda: f'.shared-{uuid.uuid4().hex}')
  try:
    group.first(path.touch)
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (is_seen := path.exists()) and time.monotonic() < end:
      time.sleep(0.1)
    hidden = [i for i, seen in enumerate(group.gather(is_seen)) if not seen]
  finally:  # A signal may interrupt the wait.
    if group.is_first:
      path.unlink(missing_ok=True)
  if hidden:
    raise UserError(
      f'--workdir={workdir}: process {", ".join(map(str, hidden))} does not '
      'see the directory of process 0; it must be on a file system that all '
      'processes share'
    )


def first(make: Callable[[], T]) -> T:
  """Returns make() of process 0, which alone calls it, on all processes.

  Args:
    make: Returns a JSON value.

  Raises:
    PeerError: `make` raised, on the other processes.
  """
  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  return processes.group('first').first(make)


def watch(hang_timeout: float) -> None:
  """Starts threads that end this process after others fail or hang.

  The main thread may wait for another process inside a collective operation,
  where no exception reaches it.

  Args:
    hang_timeout: Seconds without progress that end the process; 0 disables it.
  """
  from trainers.runtime import failures, store, watchdog  # noqa: PLC0415 (JAX)

  shared = store.of_run()
  # JAX aborts this process if another one dies: the stack would say nothing.
  faulthandler.disable()
  if hang_timeout:
    watchdog.start(hang_timeout, lambda code: _end(shared, code))

  def listen():
    try:
      failure = failures.wait_for_peer(shared)
    except Exception:  # The run has ended.
      return
    if failure and not _is_leaving.wait(GRACE_SECONDS):
      log.error('%s', failure)
      _end(shared, failure.code)

  threading.Thread(target=listen, daemon=True, name='peers').start()


def leave(error: BaseException) -> None:
  """Ends a process that failed, if the run has others. Does not return then.

  JAX would wait for the other processes when the interpreter exits.

  Args:
    error: Exception that ends the process; its message was shown if it is
      SystemExit.
  """
  if 'jax' not in sys.modules:
    return
  from trainers.runtime import failures, store  # noqa: PLC0415 (JAX)

  if _codes:  # Threads wait inside JAX: the interpreter could not end them.
    _flush()
    os._exit(_codes[0])
  shared = store.of_run()
  if shared is None:
    return
  _is_leaving.set()
  shown = isinstance(error, SystemExit)
  code = error.code if shown and isinstance(error.code, int) else 1
  if not shown:
    traceback.print_exception(error)
  cause = error.__context__ if shown else error
  failures.report(shared, cause or error)
  _end(shared, code)


def _end(store: Any, code: int) -> None:
  """Exits; process 0, whose end would abort the others, leaves last."""
  from trainers.runtime import failures  # noqa: PLC0415 (JAX takes seconds)

  _flush()
  try:
    # A process that died says nothing; the others find that out as fast.
    if failures.reported(store):
      seconds = GRACE_SECONDS + 2
    else:
      seconds = _UNREPORTED_SECONDS
    failures.leave_in_order(store, seconds)
  finally:
    os._exit(code)


def _flush() -> None:
  logging.shutdown()
  for stream in (sys.stdout, sys.stderr):
    stream.flush()


def finish(code: int) -> None:
  """Ends the connection to the other processes, which end now, too.

  Args:
    code: Exit code of the command.
  """
  import jax  # noqa: PLC0415 (it takes seconds)

  _is_leaving.set()
  _codes.append(code)
  try:
    jax.distributed.shutdown()
  except Exception as error:  # The run is saved: this is no failure of it.
    log.warning('another process ended early: %s', str(error).splitlines()[0])
