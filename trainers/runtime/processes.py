"""Decisions that all processes of a run make together.

Processes talk through the key-value store of JAX's coordination service, so a
decision needs neither a clock nor a disk nor a device. One process decides
alone, at once.
"""

from collections.abc import Callable
import itertools
import json
from typing import Any, TypeVar

from trainers.errors import PeerError
from trainers.runtime import failures, watchdog
from trainers.runtime import store as store_lib
from trainers.runtime.store import Store

T = TypeVar('T')

# Python handles signals between two calls, so no call may wait for long.
_WAIT_MS = 1000


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
    is_patient: Whether an exchange continues after a process reported a
      failure: its other threads may still take part.

  Attributes:
    name: Name of the group.
    index: Index of this process.
    size: Number of processes.
  """

  def __init__(
    self,
    name: str,
    store: Store | None = None,
    index: int = 0,
    size: int = 1,
    *,
    is_patient: bool = False,
  ):
    self.name, self.index, self.size = name, index, size
    self._store = store
    self._is_patient = is_patient
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
      return json.loads(self._get(f'{prefix}/all'))
    values = [value] + [
      json.loads(self._get(f'{prefix}/{i}')) for i in range(1, self.size)
    ]
    self._store.key_value_set(f'{prefix}/all', json.dumps(values))
    if number:
      # All processes have read the previous round: they are in this one.
      self._store.key_value_delete(f'{self.name}/{number - 1}')
    return values

  def _get(self, key: str) -> str:
    assert self._store is not None
    return wait_for(self._store, key, is_patient=self._is_patient)

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
    errors = self.gather(error and failures.message(error))
    if error:
      raise error
    for index, message in enumerate(errors):
      _raise(index, message)

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
    reply = [value, error and failures.message(error)]
    value, message = self.gather(reply)[0]
    if error:
      raise error
    _raise(0, message)
    return value


_numbers: dict[str, itertools.count] = {}


def group(name: str, *, is_patient: bool = False) -> Group:
  """Returns a group of all processes of the run.

  Args:
    name: Name of the group, which may be used again.
    is_patient: As of `Group`.
  """
  store = store_lib.of_run()
  if store is None:
    return Group(name)
  number = next(_numbers.setdefault(name, itertools.count()))
  index, size = store_lib.index_and_size()
  return Group(
    f'nanomoe/{name}/{number}', store, index, size, is_patient=is_patient
  )


def wait_for(store: Store, key: str, *, is_patient: bool = False) -> str:
  """Returns the value of a key once a process has set it.

  JAX ends this process if another one dies meanwhile. `watchdog` ends it if
  another one hangs.

  Args:
    store: Store of the key.
    key: Name of the value.
    is_patient: Whether the wait continues after another process failed.

  Raises:
    PeerError: Another process failed.
  """
  while (value := store_lib.get(store, key, _WAIT_MS)) is None:
    if not is_patient and (failure := failures.of_peer(store)):
      raise failure
  return value


def _raise(index: int, message: list[Any] | None) -> None:
  if message:
    text, code = message
    raise PeerError(f'process {index}: {text}', code)
