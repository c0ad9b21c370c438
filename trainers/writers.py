"""Where metrics go: metrics.jsonl, and CLU writers (TensorBoard)."""

from collections.abc import Sequence
import logging
import os
import pathlib
from typing import Any

from clu import metric_writers
import numpy as np

from trainers.files import to_json
from trainers.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class MetricsFile:
  """metrics.jsonl: one JSON object per line, `step` first.

  Args:
    path: of the file.
    size: what to keep of it, in bytes. A checkpoint records how long the file
      was; resuming cuts it there, so that no step is told twice.
  """

  def __init__(self, path: pathlib.Path, size: int):
    self._file = path.open('ab', buffering=0)
    if self._file.tell() > size:
      self._file.truncate(size)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Whole lines only: what a full disk cut off is taken back."""
    size = self.tell()
    try:
      self._file.write(to_json({'step': step, **metrics}).encode() + b'\n')
    except OSError:
      os.truncate(self._file.name, size)
      raise

  def tell(self) -> int:
    return self._file.seek(0, 2)

  def close(self) -> None:
    self._file.close()


class Writers:
  """Everything that gets the metrics of a run; without a workdir, nothing.

  A writer that fails is told of once, and left out: the run goes on.
  """

  def __init__(
    self,
    workdir: pathlib.Path | None,
    extra: Sequence[metric_writers.MetricWriter] = (),
  ):
    self._workdir = workdir
    self._file: MetricsFile | None = None
    self._parts: list[metric_writers.MetricWriter] = list(extra)
    self._failed: set[str] = set()
    self.clu = metric_writers.MultiWriter(self._parts)

  def start(self, step: int, file_size: int) -> None:
    """Opens the files; what they say of steps after `step` is superseded."""
    if self._workdir is None:
      return
    self._file = MetricsFile(self._workdir / 'metrics.jsonl', file_size)
    summaries = SummaryWriter(self._workdir)
    summaries.start_session(step)
    self._parts.insert(0, summaries)
    self.clu = metric_writers.MultiWriter(self._parts)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Numbers are scalars, lists (a load per layer and expert) histograms."""
    metrics = {
      k: v.tolist() if hasattr(v, 'tolist') else v for k, v in metrics.items()
    }
    arrays = {
      k: np.asarray(v) for k, v in metrics.items() if isinstance(v, list)
    }
    scalars = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    if self._file:
      try:
        self._file.write(step, metrics)
      except OSError as error:
        self._warn_once(self._file, error)
    for part in list(self._parts):
      try:
        part.write_scalars(step, scalars)
        if arrays:
          part.write_histograms(step, arrays)
        part.flush()
      except Exception as error:  # Whatever somebody's writer raises.
        self._warn_once(part, error)
        self._parts.remove(part)
        self.clu = metric_writers.MultiWriter(self._parts)

  def file_size(self) -> int:
    """Bytes of metrics.jsonl so far."""
    return self._file.tell() if self._file else 0

  def close(self) -> None:
    for part in [*self._parts, self._file]:
      try:
        if part:
          part.close()
      except Exception as error:  # What was trained is saved already.
        self._warn_once(part, error)

  def _warn_once(self, part: Any, error: Exception) -> None:
    name = type(part).__name__
    if name not in self._failed:
      self._failed.add(name)
      log.warning('%s failed, the run goes on without: %r', name, error)


class Writer(metric_writers.MetricWriter):
  """A MetricWriter that ignores all: override what yours is interested in."""

  def write_summaries(self, step, values, metadata=None):
    pass

  def write_scalars(self, step, scalars):
    pass

  def write_images(self, step, images):
    pass

  def write_videos(self, step, videos):
    pass

  def write_audios(self, step, audios, *, sample_rate):
    pass

  def write_texts(self, step, texts):
    pass

  def write_histograms(self, step, arrays, num_buckets=None):
    pass

  def write_hparams(self, hparams):
    pass

  def flush(self):
    pass

  def close(self):
    pass
