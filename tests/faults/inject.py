"""python -m tests.faults.inject PLACE NUMBER WHAT --config=...: a main job.

WHAT happens when it comes to PLACE for the NUMBERth time: it gets signals
(KILL, or TERM,INT), its group of processes gets one (all:TERM), no file of it
can grow beyond a number of kilobytes (38), or one of ACTIONS. Functions are
replaced: no product code knows of faults.
"""

from collections.abc import Callable
import errno
import functools
import os
import pathlib
import resource
import runpy
import signal
import sys
import time
from typing import Any

from nanomoe import experiment
from nanomoe.callbacks import text_sample
from nanomoe.run import cli, cluster, peers, provenance
from trainers import evaluator, step_runner, trainer
from trainers.checkpoint import checkpointer, saver


def replace(owner: Any, name: str, make: Callable) -> None:
  original = getattr(owner, name)
  setattr(owner, name, functools.wraps(original)(make(original)))


def before(owner: Any, name: str) -> Callable:
  """A place: where owner.name is called."""

  def place(act):
    def make(original):
      def call(*args, **kwargs):
        act()
        return original(*args, **kwargs)

      return call

    replace(owner, name, make)

  return place


def after(owner: Any, name: str) -> Callable:
  """A place: where owner.name has returned."""

  def place(act):
    def make(original):
      def call(*args, **kwargs):
        result = original(*args, **kwargs)
        act()
        return result

      return call

    replace(owner, name, make)

  return place


def within(owner: Any, name: str) -> Callable:
  """A place: where the iterator that owner.name returns gives its third."""

  def place(act):
    def make(original):
      def call(*args, **kwargs):
        for i, item in enumerate(original(*args, **kwargs)):
          if i == 2:
            act()
          yield item

      return call

    replace(owner, name, make)

  return place


def evaluating(act: Callable) -> None:
  """A place: between the first two batches of an evaluation."""

  def make(original):
    def call(self, params, model_state, batches, poll):
      def watched():
        for i, batch in enumerate(batches):
          if i == 1:
            act()
          yield batch

      return original(self, params, model_state, watched(), poll)

    return call

  replace(evaluator.Evaluator, '__call__', make)


def collecting(act: Callable) -> None:
  """A place: where a checkpoint that is too old is half deleted."""

  def make(original):
    def call(directory, step):
      old = pathlib.Path(directory, str(step))
      gone = old.rename(old.with_name(f'{step}.deleted{saver.UNFINISHED}'))
      for path in [path for path in gone.rglob('*') if path.is_file()][::2]:
        path.unlink()
      act()
      return original(directory, step)

    return call

  replace(saver, 'delete', make)


PLACES: dict[str, Callable] = {
  # Of several processes: before they look for each other.
  'arrival': before(cluster, 'connect'),
  'start': before(experiment, 'build'),
  'step': after(step_runner.StepRunner, '__call__'),
  'evaluation': evaluating,
  # It has begun, and goes on in the background.
  'save': after(checkpointer.Checkpointer, 'save'),
  # In its thread, before the arrays are copied.
  'copy': before(saver.Saver, '_copy'),
  # What the manifest will name is on the disk.
  'manifest': before(checkpointer.Checkpointer, '_write_manifest'),
  'collection': collecting,
  'sample': within(text_sample.Generator, '__call__'),
  'end': before(trainer.Trainer, '_close'),
  # Of several processes: all is closed.
  'parting': before(peers, 'finish'),
}


def arrive(number: str, act: Callable[[], None]) -> Callable[[], None]:
  """Acts when it is called for the `number`th time."""
  count = 0

  def call():
    nonlocal count
    count += 1
    if count == int(number):
      act()

  return call


def send(names: str) -> None:
  group, _, one = names.rpartition(':')
  if group:
    os.killpg(0, signal.Signals[f'SIG{one}'])
    return
  for name in names.split(','):
    os.kill(os.getpid(), signal.Signals[f'SIG{name}'])


def fail() -> None:
  """What the process does fails, as if the disk were full this once."""
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def hang() -> None:
  """The main thread sleeps, and the process lives."""
  while True:
    time.sleep(1)


def wait() -> None:
  """The main thread sleeps until the test makes a file."""
  while not pathlib.Path(f'{os.environ[NOTE]}.continue').exists():
    time.sleep(0.05)


def change_version() -> None:
  """The process has another NumPy, it says."""
  found = {**provenance.versions(), 'numpy': '0.0.1'}
  provenance.versions = lambda: found


def limit_files(kilobytes: str) -> None:
  """No file can grow beyond: as if the disk were full."""
  # Python ignores SIGXFSZ; another thread than the first could not.
  assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
  size = int(kilobytes) * 1000
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


ACTIONS: dict[str, Callable[[], None]] = {
  'fail': fail,
  'hang': hang,
  'wait': wait,
  'change_version': change_version,
}
# Variable with the path of a file that gets the time of the fault.
NOTE = 'NANOMOE_TEST_FAULT'


def note_time() -> None:
  """The fault is now."""
  if note := os.environ.get(NOTE):
    pathlib.Path(note).write_text(str(time.monotonic()))


def act(what: str) -> None:
  note_time()
  if what in ACTIONS:
    ACTIONS[what]()
  elif what.isdecimal():
    limit_files(what)
  else:
    send(what)


def main() -> None:
  _, place, number, what, *rest = sys.argv
  PLACES[place](arrive(number, lambda: act(what)))
  sys.argv = ['nanomoe.main', *rest]
  try:
    runpy.run_module('nanomoe.main', run_name='__main__', alter_sys=True)
  finally:
    # Another program that runs the job gets its hook back. This one ends as the
    # command does, whose hook stays.
    sys.unraisablehook = cli._report_unraisable


if __name__ == '__main__':
  main()
