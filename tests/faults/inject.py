"""python -m tests.faults.inject FAULT [ARGUMENTS] --config=...: the main job.

With one function replaced: no product code knows of faults. FAULT is a name in
FAULTS.
"""

import os
import runpy
import signal
import sys


def kill() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


FAULTS = {}


if __name__ == '__main__':
  _, name, *rest = sys.argv
  fault = FAULTS[name]
  arguments = [word for word in rest if not word.startswith('-')]
  fault(*arguments)
  sys.argv = ['nanomoe.main', *rest[len(arguments) :]]
  runpy.run_module('nanomoe.main', run_name='__main__', alter_sys=True)
