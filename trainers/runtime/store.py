"""Key-value store that the processes of a run share.

It is that of JAX's coordination service, in process 0.
"""

from typing import Any, Protocol

import jax
from jax._src import distributed


class Store(Protocol):
  """Key-value store that all processes share, as JAX's client is one."""

  def key_value_set(self, key: str, value: str, /) -> None: ...
  def blocking_key_value_get(self, key: str, timeout_ms: int, /) -> str: ...
  def key_value_try_get(self, key: str, /) -> str: ...
  def key_value_delete(self, key: str, /) -> None: ...


def of_run() -> Any:
  """Returns the store of the run; None if there is one process."""
  # JAX has no public name for it; Orbax uses this one, too.
  return distributed.global_state.client


def index_and_size() -> tuple[int, int]:
  """Returns the index of this process and the number of processes.

  JAX's own functions would wait for the devices of all processes.
  """
  state = distributed.global_state
  return state.process_id, state.num_processes


def set_once(store: Store, key: str, value: str) -> None:
  """Sets a key, unless a process has set it before."""
  try:
    store.key_value_set(key, value)
  except jax.errors.JaxRuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise


def get(store: Store, key: str, timeout_ms: int) -> str | None:
  """Returns the value of a key, or None if no process sets it in time."""
  try:
    return store.blocking_key_value_get(key, timeout_ms)
  except jax.errors.JaxRuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise
    return None
