"""Agreement of all processes on the moment at which a signal stops them."""

import threading

import jax

from trainers.errors import PeerError
from trainers.runtime import failures, processes
from trainers.runtime import store as store_lib
from trainers.runtime.store import Store
from trainers.signals import Interrupt


class Stop:
  """Decision to stop, which is the same in all processes.

  All processes call `poll` in the same order. If one has a signal, a thread of
  each reports its number of polls, and all stop at the poll after the largest:
  none has passed it. Polls of a run without a signal exchange nothing.

  Args:
    interrupt: Signals of this process.
    store: Store that the processes share; None if there is one process.
    index: Index of this process.
    size: Number of processes.
    name: Prefix of the keys in the store.
  """

  def __init__(
    self,
    interrupt: Interrupt,
    store: Store | None = None,
    index: int = 0,
    size: int = 1,
    name: str = 'stop',
  ):
    self._interrupt = interrupt
    self._store = store
    self._index, self._size = index, size
    self._name = name
    self._lock = threading.Lock()
    self._num_polls = 0
    self._is_announced = False  # By this process.
    self._is_reported = False  # The number of polls of this process.
    self._last: int | None = None  # Poll at which all processes stop.
    self._decided = threading.Event()
    if store is not None:
      threading.Thread(target=self._listen, args=[store], daemon=True).start()

  def poll(self) -> bool:
    """Returns whether all processes stop here."""
    if self._store is None:
      return bool(self._interrupt)
    with self._lock:
      self._num_polls += 1
      number, is_reported = self._num_polls, self._is_reported
    if self._interrupt and not self._is_announced:
      self._is_announced = True
      name = str(self._interrupt.name)
      store_lib.set_once(self._store, f'{self._name}/signal', name)
    if not is_reported:
      return False
    while not self._decided.wait(1):
      if failure := failures.of_peer(self._store):
        raise failure
    return number >= (self._last or 0)

  def _listen(self, store: Store) -> None:
    """Waits for a signal of any process, then reports and decides."""
    try:
      signal = processes.wait_for(store, f'{self._name}/signal')
      with self._lock:
        self._is_reported = True
        reported = self._num_polls
      store.key_value_set(f'{self._name}/{self._index}', str(reported))
      polls = [
        int(processes.wait_for(store, f'{self._name}/{i}'))
        for i in range(self._size)
      ]
    except (jax.errors.JaxRuntimeError, PeerError):
      # The run has ended.
      return
    self._interrupt.name = signal
    self._last = max(polls) + 1
    self._decided.set()


def of_run(interrupt: Interrupt) -> Stop:
  """Returns the decision of all processes of the run.

  Args:
    interrupt: Signals of this process.
  """
  group = processes.group('stop')
  return Stop(
    interrupt, store_lib.of_run(), group.index, group.size, group.name
  )
