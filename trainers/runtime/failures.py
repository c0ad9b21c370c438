"""Failures of other processes of a run, and the order in which all end."""

import contextlib
import json
import time
from typing import Any

import jax

from trainers.errors import INTERRUPTED, USER_ERROR, PeerError, UserError
from trainers.runtime import store as store_lib
from trainers.runtime.store import Store

KEY = 'nanomoe/failure'
# Time in which a process that fails reports it, after its connections break.
REPORT_SECONDS = 1.0
# Time that a process needs to exit once it has said so.
_EXIT_SECONDS = 0.5


def message(error: BaseException) -> tuple[str, int]:
  """Returns the message of an error in one line, and its exit code."""
  if isinstance(error, KeyboardInterrupt):
    return f'interrupted by {error or "Ctrl-C"}', INTERRUPTED
  text = ' '.join(str(error).split()) or repr(error)
  return text, USER_ERROR if isinstance(error, UserError) else 1


def report(store: Store | None, error: BaseException) -> None:
  """Tells the other processes that this one ends. The first report counts.

  Args:
    store: Store of the run; None if there is one process.
    error: Reason. That of another process is not reported again.
  """
  if store is None or isinstance(error, PeerError):
    return
  text, code = message(error)
  index, _ = store_lib.index_and_size()
  value = json.dumps({'process': index, 'text': text, 'code': code})
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # The run has ended.
    store_lib.set_once(store, KEY, value)


def reported(store: Store) -> dict[str, Any] | None:
  """Returns the first report of a failure, or None.

  Its keys are `process`, `text` and `code`, as `report` writes them.
  """
  try:
    return json.loads(store.key_value_try_get(KEY))
  except jax.errors.JaxRuntimeError:
    return None


def of_peer(store: Store) -> PeerError | None:
  """Returns the failure that another process reported, or None."""
  found = reported(store)
  if not found or found['process'] == store_lib.index_and_size()[0]:
    return None
  return PeerError(
    f'process {found["process"]} ended the run: {found["text"]}', found['code']
  )


def wait_for_peer(store: Store) -> PeerError | None:
  """Returns the failure of another process, once one reports it.

  Returns:
    None if this process itself has reported one.
  """
  while store_lib.get(store, KEY, 60_000) is None:
    pass
  return of_peer(store)


def leave_in_order(store: Store, seconds: float) -> None:
  """Makes process 0 wait until the others are about to end.

  Args:
    store: Store of the run.
    seconds: Bound of the wait.
  """
  index, size = store_lib.index_and_size()
  if index:
    store.key_value_set(f'nanomoe/left/{index}', '')
    return
  end = time.monotonic() + seconds
  for other in range(1, size):
    left = max(round(1000 * (end - time.monotonic())), 1)
    if store_lib.get(store, f'nanomoe/left/{other}', left) is None:
      return
  time.sleep(_EXIT_SECONDS)


def explained(error: BaseException) -> BaseException:
  """Returns the failure of the process that caused an error, if one did.

  Args:
    error: Error of a collective operation, or any other error.
  """
  store = store_lib.of_run()
  if store is None or not isinstance(error, jax.errors.JaxRuntimeError):
    return error
  text, _ = message(error)
  if 'Gloo' not in text and 'NCCL' not in text:
    return error
  end = time.monotonic() + REPORT_SECONDS
  while time.monotonic() < end:
    if failure := of_peer(store):
      return failure
    time.sleep(0.1)
  died = PeerError(f'another process of the run died: {text}')
  died.__cause__ = error
  return died
