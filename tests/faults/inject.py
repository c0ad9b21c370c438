"""python -m tests.faults.inject PLACE NUMBER SIGNALS --config=...: a main job.

It gets SIGNALS (KILL, or TERM,INT) when it comes to PLACE for the NUMBERth
time. One function is replaced: no product code knows of faults.
"""

from collections.abc import Callable
import functools
import os
import pathlib
import resource
import runpy
import signal
import sys
from typing import Any

from nanomoe import experiment
from nanomoe.callbacks import text_sample
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
  'start': before(experiment, 'build'),
  'step': after(step_runner.StepRunner, '__call__'),
  'evaluation': evaluating,
  # It has begun, and goes on in the background.
  'save': after(checkpointer.Checkpointer, 'save'),
  # What the manifest will name is on the disk.
  'manifest': before(checkpointer.Checkpointer, '_write_manifest'),
  'collection': collecting,
  'sample': within(text_sample.Generator, '__call__'),
  'end': before(trainer.Trainer, '_close'),
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
  for name in names.split(','):
    os.kill(os.getpid(), signal.Signals[f'SIG{name}'])


def limit_files(kilobytes: str) -> None:
  """No file can grow beyond: as if the disk were full."""
  # Python ignores SIGXFSZ. A save in a thread could not change the handler.
  size = int(kilobytes) * 1000
  hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def main() -> None:
  _, place, number, what, *rest = sys.argv
  action = limit_files if what.isdecimal() else send
  PLACES[place](arrive(number, lambda: action(what)))
  sys.argv = ['nanomoe.main', *rest]
  runpy.run_module('nanomoe.main', run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
