"""A worker's side of the conversation: standard library only.

A line '<what> <n>' on standard input; a line of JSON, n numbers, on standard
output. Imported by workers that run in environments of their own.
"""

from collections.abc import Callable
import json
import os
import sys

Timer = Callable[[int], list[float]]


def serve(makers: dict[str, Callable[[], Timer]]) -> None:
  """Answers until standard input ends.

  Args:
    makers: by what is timed; called at its first mention, and what they return
      is called with n and returns n times in seconds.
  """
  # Libraries print; only answers may reach whoever asks.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  timers: dict[str, Timer] = {}
  for line in sys.stdin:
    what, n = line.split()
    if what not in timers:
      timers[what] = makers[what]()
    print(json.dumps(timers[what](int(n))), file=answers, flush=True)
