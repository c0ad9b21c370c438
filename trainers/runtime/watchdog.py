"""Watchdog that ends a process which makes no progress.

Other processes of a run wait for such a process for ever: it lives, so JAX does
not miss it.
"""

from collections.abc import Callable
import faulthandler
import logging
import os
import sys
import threading
import time

log = logging.getLogger(__name__)

EXIT_CODE = 1

_last = time.monotonic()


def beat() -> None:
  """Reports progress of the main thread."""
  global _last
  _last = time.monotonic()


def start(
  seconds: float, leave: Callable[[int], object] = os._exit
) -> threading.Thread:
  """Starts a thread that ends the process after `seconds` without progress.

  The thread first writes the stack of each thread to standard error.

  Args:
    seconds: Bound, longer than a compilation, a save and a step.
    leave: Ends the process, given its exit code.
  """

  def watch():
    while (left := _last + seconds - time.monotonic()) > 0:
      time.sleep(left)
    log.error(
      'no progress for %g s (--hang_timeout): the process ends; standard error '
      'lists its threads',
      seconds,
    )
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    leave(EXIT_CODE)

  beat()
  thread = threading.Thread(target=watch, daemon=True, name='watchdog')
  thread.start()
  return thread
