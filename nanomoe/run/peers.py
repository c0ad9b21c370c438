"""Other processes of a run: what all must share, and how one of them ends."""

import logging
import os
import pathlib
import sys
import threading
import time
import traceback
from typing import Any
import uuid

from trainers.errors import UserError

log = logging.getLogger(__name__)

# Time that the main thread has to close its files after another process failed.
GRACE_SECONDS = 5.0
# A network file system may show a new file late.
_VISIBLE_SECONDS = 5.0
_MAX_DIFFERENCES = 5

_is_leaving = threading.Event()


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

  def mark() -> str:
    path = workdir / f'.shared-{uuid.uuid4().hex}'
    path.touch()
    return path.name

  path = workdir / group.first(mark)
  end = time.monotonic() + _VISIBLE_SECONDS
  while not (is_seen := path.exists()) and time.monotonic() < end:
    time.sleep(0.1)
  hidden = [i for i, seen in enumerate(group.gather(is_seen)) if not seen]
  if group.is_first:
    path.unlink(missing_ok=True)
  if hidden:
    raise UserError(
      f'--workdir={workdir}: process {", ".join(map(str, hidden))} does not '
      'see the directory of process 0; it must be on a file system that all '
      'processes share'
    )


def watch() -> None:
  """Starts a thread that ends this process after another one reports a failure.

  The main thread may wait for the other process inside a collective operation,
  where no exception reaches it.
  """
  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  store = processes.store()

  def listen():
    try:
      failure = processes.wait_for_failure(store)
    except Exception:  # The run has ended.
      return
    if not _is_leaving.wait(GRACE_SECONDS):
      log.error('%s', failure)
      _end(store, failure.code)

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
  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  store = processes.store()
  if store is None:
    return
  _is_leaving.set()
  code = error.code if isinstance(error, SystemExit) else 1
  if not isinstance(error, SystemExit):
    traceback.print_exception(error)
  try:
    if not processes.peer_failure(store):
      cause = error.__context__ if isinstance(error, SystemExit) else error
      text = ' '.join(str(cause or error).split()) or type(cause).__name__
      processes.report_failure(store, text, int(code or 0))
  except Exception as failed:
    log.debug('the failure could not be reported: %r', failed)
  _end(store, int(code or 0))


def _end(store: Any, code: int) -> None:
  """Exits; process 0, whose end would abort the others, leaves last."""
  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  logging.shutdown()
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  try:
    processes.leave_in_order(store, GRACE_SECONDS + 2)
  finally:
    os._exit(code)


def finish(code: int) -> None:
  """Ends the connection to the other processes, which end now, too.

  Args:
    code: Exit code of the command.
  """
  import jax  # noqa: PLC0415 (it takes seconds)

  from trainers.runtime import processes  # noqa: PLC0415 (JAX takes seconds)

  if processes.store() is None:
    return
  _is_leaving.set()
  try:
    jax.distributed.shutdown()
  except Exception as error:  # The run is saved: this is no failure of it.
    log.warning('another process ended early: %s', str(error).splitlines()[0])
    logging.shutdown()
    os._exit(code)
