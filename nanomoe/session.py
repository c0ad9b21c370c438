"""Training in a process that outlives the run: a notebook or a script.

Signal handlers, loggers and locks are restored at the end of the run.
"""

from collections.abc import Callable, Collection
import pathlib
import sys
import threading
from typing import Any

from nanomoe import main as main_lib
from nanomoe.config import schema
from nanomoe.run import backend, cache, terminal
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError

# Loggers and signal handlers belong to the process: one run at a time.
_TRAINING = threading.Lock()


def start() -> None:
  """Imports JAX, initializes its devices, and keeps compiled programs.

  Raises:
    UserError: An environment variable of JAX or XLA has a bad value, or there
      is no such device.
  """
  backend.import_jax()
  cache.keep_programs_of_this_process()
  backend.start()


def fit(
  config: schema.Config,
  workdir: pathlib.Path,
  allow_changed: Collection[str] = (),
  *,
  progress: bool = True,
) -> None:
  """Trains to the end, and shows the progress.

  Args:
    config: Checked config of the run.
    workdir: Directory of the run, which resumes if it has begun.
    allow_changed: Names in `resume.ALLOWABLE` that may differ from the
      checkpoint.
    progress: Whether more than warnings and errors is shown.

  Raises:
    UserError: A line for each mistake, or another run is training in this
      process.
    KeyboardInterrupt: A signal stopped the run. A run that has begun is saved.
  """
  if not _TRAINING.acquire(blocking=False):
    raise UserError(
      f'--workdir={workdir}: another run is training in this process; one at a '
      'time is allowed'
    )
  try:
    _fit(config, workdir, allow_changed, progress)
  finally:
    _TRAINING.release()


def _fit(
  config: schema.Config,
  workdir: pathlib.Path,
  allow_changed: Collection[str],
  progress: bool,
) -> None:
  start()
  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)

  display = _notebook_display() if progress else None
  is_made = not workdir.exists()
  with terminal.restored_loggers():
    console = terminal.log_to_terminal(
      sys.stderr, quiet=not progress or display is not None
    )
    workdir_lib.log_to(workdir)
    try:
      trainer = experiment.build(config, workdir, allow_changed)
    except (UserError, KeyboardInterrupt):
      if is_made:
        workdir_lib.discard(workdir)
      raise
    trainer.interrupt.ends_process = False
    if display:
      from trainers.callbacks import notebook_progress  # noqa: PLC0415

      bar = notebook_progress.NotebookProgress(display)
      trainer.callbacks.append(bar)
    elif console and progress:
      from trainers.callbacks import live_progress  # noqa: PLC0415

      trainer.callbacks.append(live_progress.LiveProgress(console))
    status = trainer.fit()
    if status == 'interrupted':
      raise KeyboardInterrupt(
        f'{trainer.stop_reason}: step {trainer.step} is saved; '
        f'nanomoe.load({str(workdir)!r}).resume() continues'
      )
    if status != 'done' or (progress and not display):
      main_lib.report(trainer, workdir, set())


def _notebook_display() -> Callable[..., Any] | None:
  """Returns IPython's function `display` in a notebook, otherwise None."""
  ipython = sys.modules.get('IPython')
  shell = ipython and ipython.get_ipython()
  if getattr(shell, 'kernel', None) is None:
    return None
  from IPython.display import display  # noqa: PLC0415 # pyright: ignore

  return display
