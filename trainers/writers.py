"""Where metrics go: metrics.jsonl, and CLU writers (TensorBoard)."""

from collections.abc import Sequence
import pathlib
from typing import Any

from clu import metric_writers
import numpy as np

from trainers.files import to_json
from trainers.tensorboard import SummaryWriter


class MetricsFile:
  """metrics.jsonl: one JSON object per line, `step` first.

  Args:
    path: of the file.
    size: what to keep of it, in bytes. A checkpoint records how long the file
      was; resuming cuts it there, so that no step is told twice.
  """

  def __init__(self, path: pathlib.Path, size: int):
    self._file = path.open('ab')
    if self._file.tell() > size:
      self._file.truncate(size)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    self._file.write(to_json({'step': step, **metrics}).encode() + b'\n')
    self._file.flush()

  def tell(self) -> int:
    return self._file.seek(0, 2)

  def close(self) -> None:
    self._file.close()


class Writers:
  """Everything that gets the metrics of a run; without a workdir, nothing."""

  def __init__(
    self,
    workdir: pathlib.Path | None,
    extra: Sequence[metric_writers.MetricWriter] = (),
  ):
    self._workdir = workdir
    self._file: MetricsFile | None = None
    self.clu = metric_writers.MultiWriter(list(extra))

  def start(self, step: int, file_size: int) -> None:
    """Opens the files; what they say of steps after `step` is superseded."""
    if self._workdir is None:
      return
    self._file = MetricsFile(self._workdir / 'metrics.jsonl', file_size)
    summaries = SummaryWriter(self._workdir)
    summaries.start_session(step)
    self.clu = metric_writers.MultiWriter([summaries, self.clu])

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Numbers are scalars, lists (a load per layer and expert) histograms."""
    if self._file:
      self._file.write(step, metrics)
    arrays = {k: v for k, v in metrics.items() if isinstance(v, list)}
    self.clu.write_scalars(
      step, {k: v for k, v in metrics.items() if k not in arrays}
    )
    if arrays:
      self.clu.write_histograms(
        step, {k: np.asarray(v) for k, v in arrays.items()}
      )
    self.clu.flush()

  def file_size(self) -> int:
    """Bytes of metrics.jsonl so far."""
    return self._file.tell() if self._file else 0

  def close(self) -> None:
    self.clu.close()
    if self._file:
      self._file.close()
