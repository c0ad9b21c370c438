"""Decisions that all processes of a run make together.

Processes talk through the key-value store of JAX's coordination service, so a
decision needs neither a clock nor a disk nor a device. One process decides
alone, at once.
"""

from collections.abc import Callable
import contextlib
import itertools
import json
import logging
import time
from typing import Any, Protocol, TypeVar

import jax
from jax._src import distributed

from trainers.errors import PeerError, UserError
from trainers.runtime import watchdog

log = logging.getLogger(__name__)

T = TypeVar('T')

# Python handles signals between two calls, so no call may wait for long.
_WAIT_MS = 1000
_FAILURE = 'nanomoe/failure'
# Time in which a process that fails reports it, after its connections break.
REPORT_SECONDS = 1.0


class Store(Protocol):
  """Key-value store that all processes share, as JAX's client is one."""

  def key_value_set(self, key: str, value: str, /) -> None: ...
  def blocking_key_value_get(self, key: str, timeout_ms: int, /) -> str: ...
  def key_value_try_get(self, key: str, /) -> str: ...
  def key_value_delete(self, key: str, /) -> None: ...


class Group:
  """Processes that exchange values, in the same order on each of them.

  Each thread that decides needs a group of its own: the order of its calls
  must be the same on all processes.

  Args:
    name: Name of the group. All processes create groups of a name in the same
      order.
    store: Store that the processes share; None makes a group of one process.
    index: Index of this process.
    size: Number of processes.

  Attributes:
    name: Name of the group.
    index: Index of this process.
    size: Number of processes.
  """

  def __init__(
    self, name: str, store: Store | None = None, index: int = 0, size: int = 1
  ):
    self.name, self.index, self.size = name, index, size
    self._store = store
    self._rounds = itertools.count()

  @property
  def is_first(self) -> bool:
    """True on process 0, which alone writes files."""
    return self.index == 0

  def gather(self, value: Any) -> list[Any]:
    """Returns the values of all processes, in their order.

    Args:
      value: JSON value of this process.
    """
    if self._store is None:
      return [value]
    number = next(self._rounds)
    watchdog.beat()
    prefix = f'{self.name}/{number}'
    if not self.is_first:
      self._store.key_value_set(f'{prefix}/{self.index}', json.dumps(value))
      return json.loads(wait_for(self._store, f'{prefix}/all'))
    values = [value] + [
      json.loads(wait_for(self._store, f'{prefix}/{i}'))
      for i in range(1, self.size)
    ]
    self._store.key_value_set(f'{prefix}/all', json.dumps(values))
    if number:
      # All processes have read the previous round: they are in this one.
      self._store.key_value_delete(f'{self.name}/{number - 1}')
    return values

  def check(self, error: BaseException | None) -> None:
    """Raises an error on all processes if one of them has an error.

    Args:
      error: Error of this process, or None.

    Raises:
      PeerError: Only other processes have an error.
      BaseException: `error`.
    """
    if self._store is None:
      if error:
        raise error
      return
    errors = self.gather(_report(error))
    if error:
      raise error
    for index, report in enumerate(errors):
      _raise(index, report)

  def first(self, make: Callable[[], T]) -> T:
    """Returns make() of process 0, which alone calls it.

    Args:
      make: Returns a JSON value. If it raises, all processes raise.

    Raises:
      PeerError: `make` raised, on the other processes.
    """
    if self._store is None:
      return make()
    value, error = None, None
    if self.is_first:
      try:
        value = make()
      except Exception as raised:
        error = raised
    value, report = self.gather([value, _report(error)])[0]
    if error:
      raise error
    _raise(0, report)
    return value


_numbers: dict[str, itertools.count] = {}


def group(name: str) -> Group:
  """Returns a group of all processes of the run.

  Args:
    name: Name of the group, which may be used again.
  """
  state = distributed.global_state
  if state.client is None:
    return Group(name)
  number = next(_numbers.setdefault(name, itertools.count()))
  return Group(
    f'nanomoe/{name}/{number}',
    state.client,
    state.process_id,
    state.num_processes,
  )


def store() -> Any:
  """Returns the store of the run; None if there is one process."""
  # JAX has no public name for it; Orbax uses this one, too.
  return distributed.global_state.client


def wait_for(store: Store, key: str) -> str:
  """Returns the value of a key once a process has set it.

  JAX ends this process if another one dies meanwhile. `watchdog` ends it if
  another one hangs.

  Args:
    store: Store of the key.
    key: Name of the value.

  Raises:
    PeerError: Another process failed.
  """
  while True:
    try:
      return store.blocking_key_value_get(key, _WAIT_MS)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
    if failure := peer_failure(store):
      raise failure


def set_once(store: Store, key: str, value: str) -> None:
  """Sets a key, unless a process has set it before."""
  try:
    store.key_value_set(key, value)
  except jax.errors.JaxRuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise


def report(error: BaseException) -> None:
  """Tells the other processes that this one ends. The first report counts.

  Args:
    error: Reason. That of another process is not reported again.
  """
  state = distributed.global_state
  if state.client is None or isinstance(error, PeerError):
    return
  text, code = _report(error) or ('', 0)
  if isinstance(error, KeyboardInterrupt):
    text, code = f'interrupted by {error or "Ctrl-C"}', 75
  value = {'process': state.process_id, 'text': text, 'code': code}
  with contextlib.suppress(jax.errors.JaxRuntimeError):  # The run has ended.
    set_once(state.client, _FAILURE, json.dumps(value))


def peer_failure(store: Store) -> PeerError | None:
  """Returns the failure that another process reported, or None."""
  try:
    report = json.loads(store.key_value_try_get(_FAILURE))
  except jax.errors.JaxRuntimeError:
    return None
  if report['process'] == distributed.global_state.process_id:
    return None
  return PeerError(
    f'process {report["process"]} ended the run: {report["text"]}',
    report['code'],
  )


def wait_for_failure(store: Store) -> PeerError:
  """Returns the failure of another process, once one reports it."""
  while True:
    try:
      store.blocking_key_value_get(_FAILURE, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
    else:
      if failure := peer_failure(store):
        return failure
      raise RuntimeError('this process failed')


def leave_in_order(store: Store, seconds: float) -> None:
  """Lets process 0 wait until the others are about to end.

  Args:
    store: Store of the run.
    seconds: Bound of the wait.
  """
  state = distributed.global_state
  if index := state.process_id:
    store.key_value_set(f'nanomoe/left/{index}', '')
    return
  end = time.monotonic() + seconds
  for other in range(1, state.num_processes):
    left = max(round(1000 * (end - time.monotonic())), 1)
    try:
      store.blocking_key_value_get(f'nanomoe/left/{other}', left)
    except jax.errors.JaxRuntimeError:
      return


def explained(error: BaseException) -> BaseException:
  """Returns the failure of the process that caused an error, if one did.

  Args:
    error: Error of a collective operation, or any other error.
  """
  if store() is None or not isinstance(error, jax.errors.JaxRuntimeError):
    return error
  text = _line(error)
  if 'Gloo' not in text and 'NCCL' not in text:
    return error
  end = time.monotonic() + REPORT_SECONDS
  while time.monotonic() < end:
    if failure := peer_failure(store()):
      return failure
    time.sleep(0.1)
  died = PeerError(f'another process of the run died: {text}')
  died.__cause__ = error
  return died


def _report(error: BaseException | None) -> list[Any] | None:
  """Returns the message of an error and the exit code that it deserves."""
  return error and [_line(error), 2 if isinstance(error, UserError) else 1]


def _raise(index: int, report: list[Any] | None) -> None:
  if report:
    raise PeerError(f'process {index}: {report[0]}', report[1])


def _line(error: BaseException) -> str:
  return ' '.join(str(error).split()) or repr(error)
