"""What a run is, beside its checkpoints."""

import pathlib
from typing import Any

from nanomoe.run import workdir
from trainers.callbacks import Callback


class Records(Callback):
  """Writes {path: JSON value} when training starts.

  Not before: a start that is refused leaves them as they are.
  """

  def __init__(self, values: dict[pathlib.Path, Any]):
    self.values = values

  def on_fit_start(self, loop):
    self.write()

  def write(self) -> None:
    """Raises UserError if it cannot."""
    for path, value in self.values.items():
      workdir.write_json(path, value)
