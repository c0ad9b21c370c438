"""Files that describe a run, beside its checkpoints."""

import pathlib
from typing import Any

import jax

from nanomoe.run import workdir
from trainers.callbacks import Callback


class Records(Callback):
  """Callback that writes JSON files when training starts.

  A start that fails earlier, for example because the checkpoint does not fit,
  leaves the files of the run unchanged.

  Args:
    values: JSON value of each file, by path.
  """

  def __init__(self, values: dict[pathlib.Path, Any]):
    self.values = values

  def on_fit_start(self, loop):
    """Writes all files."""
    self.write()

  def write(self) -> None:
    """Writes all files, on process 0.

    Raises:
      UserError: A file cannot be written.
    """
    if jax.process_index():
      return
    for path, value in self.values.items():
      workdir.write_json(path, value)
