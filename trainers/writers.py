"""Where metrics go: metrics.jsonl, and CLU writers (TensorBoard)."""

from collections.abc import Sequence
import logging
import os
import pathlib
from typing import Any

from clu import metric_writers
import numpy as np

from trainers.board import Board, RunWriter
from trainers.files import to_json
from trainers.metrics import is_for_files

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


def _guarded(method: str) -> Any:
  def call(self: 'Guarded', *args: Any, **kwargs: Any) -> None:
    self.call(method, *args, **kwargs)

  return call


class Guarded(metric_writers.MetricWriter):
  """A writer that, when it fails, is told of once and left out."""

  def __init__(self, writer: metric_writers.MetricWriter):
    self.writer = writer
    self._failed = False

  def call(self, method: str, *args: Any, **kwargs: Any) -> None:
    if self._failed:
      return
    try:
      getattr(self.writer, method)(*args, **kwargs)
    except Exception as error:  # Whatever somebody's writer raises.
      self._failed = True
      _warn(self.writer, error)

  write_summaries = _guarded('write_summaries')
  write_scalars = _guarded('write_scalars')
  write_histograms = _guarded('write_histograms')
  write_images = _guarded('write_images')
  write_texts = _guarded('write_texts')
  write_audios = _guarded('write_audios')
  write_videos = _guarded('write_videos')
  write_hparams = _guarded('write_hparams')
  flush = _guarded('flush')
  close = _guarded('close')


class Writers:
  """Everything that gets the metrics of a run; without a workdir, nothing.

  A writer that fails is told of once, and left out: the run goes on.

  Attributes:
    clu: all of them as one, for callbacks.
    splits: the names before a slash that are splits.
  """

  def __init__(
    self,
    workdir: pathlib.Path | None,
    extra: Sequence[metric_writers.MetricWriter] = (),
    board: Board | None = None,
  ):
    self._workdir = workdir
    self._board = board or Board()
    self._file: MetricsFile | None = None
    self._file_failed = False
    self._run: Guarded | None = None
    self._extra = [Guarded(writer) for writer in extra]
    self.splits = {'train', self._board.split}
    self.clu = metric_writers.MultiWriter(self._extra)

  def start(self, step: int, file_size: int) -> None:
    """Opens the files; what they say of steps after `step` is superseded.

    Again, where a run goes back to an earlier step.
    """
    if self._workdir is None:
      return
    if self._run:
      self._run.call('close')
    if self._file:
      self._file.close()
    self._file = MetricsFile(self._workdir / 'metrics.jsonl', file_size)
    self._run = Guarded(
      RunWriter(self._workdir, self._board, step, self.splits)
    )
    self.clu = metric_writers.MultiWriter([self._run, *self._extra])

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Numbers are scalars, so are those of a vector; rows are histograms.

    What is not `is_for_files` is left out.
    """
    metrics = {
      k: v.tolist() if hasattr(v, 'tolist') else v
      for k, v in metrics.items()
      if is_for_files(v)
    }
    if self._file:
      try:
        self._file.write(step, metrics)
      except OSError as error:
        if not self._file_failed:
          _warn(self._file, error)
        self._file_failed = True
    scalars, histograms = {}, {}
    for name, value in metrics.items():
      if isinstance(value, (int, float)):
        scalars[name] = value
      elif isinstance(value, list):
        array = np.asarray(value)
        parts = scalars if array.ndim == 1 else histograms
        parts.update({f'{name}/{i}': part for i, part in enumerate(array)})
    self.clu.write_scalars(step, scalars)
    if histograms:
      self.clu.write_histograms(step, histograms)
    self.clu.flush()

  def file_size(self) -> int:
    """Bytes of metrics.jsonl so far."""
    return self._file.tell() if self._file else 0

  def close(self, status: str) -> None:
    """`status`: of the trainer. A run that can go on is not over."""
    if self._run and status != 'interrupted':
      self._run.call('end', success=status == 'done')
    self.clu.close()
    if self._file:
      try:
        self._file.close()
      except OSError as error:  # What was trained is saved already.
        _warn(self._file, error)


def _warn(writer: Any, error: Exception) -> None:
  name = type(writer).__name__
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
