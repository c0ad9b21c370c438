"""Where metrics go: metrics.jsonl, and CLU writers (TensorBoard)."""

from collections.abc import Sequence
import contextlib
import errno
import functools
import logging
import os
import pathlib
from typing import Any, BinaryIO

from clu import metric_writers
import numpy as np

from trainers.files import to_json
from trainers.metrics import is_for_files
from trainers.writers.run_writer import RunWriter, TensorBoardLayout
from trainers.writers.worker_thread import OwnThread

log = logging.getLogger(__name__)


# A call of a writer may take so long: less than a machine that is taken away
# gives us to save. Its last one may have much to send.
PATIENCE_SECONDS = 15
PATIENCE_AT_END_SECONDS = 60


class MetricsFile:
  """metrics.jsonl: one JSON object per line, `step` first.

  Args:
    path: of the file.
    size: what to keep of it, in bytes. A checkpoint records how long the file
      was; resuming cuts it there, so that no step is told twice. Where it was
      changed since, so that a line would be cut in two, that line goes too.
  """

  def __init__(self, path: pathlib.Path, size: int):
    self._file = path.open('a+b', buffering=0)
    if self._file.tell() < size:
      log.warning('%s is shorter than it was: lines are missing', path)
    size = min(size, self._file.tell())
    whole = _whole_lines(self._file, size)
    if whole < size:
      log.warning('%s was changed: a line that is cut in two is removed', path)
    if self._file.tell() > whole:
      self._file.truncate(whole)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Whole lines only: what a full disk cut off is taken back."""
    size = self.tell()
    line = to_json({'step': step, **metrics}) + '\n'
    raw = line.encode(errors='backslashreplace')
    try:
      if self._file.write(raw) < len(raw):  # There was room for a part.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      with contextlib.suppress(OSError):
        os.truncate(self._file.name, size)
      raise

  def tell(self) -> int:
    return self._file.seek(0, 2)

  def close(self) -> None:
    self._file.close()


def _whole_lines(file: BinaryIO, size: int) -> int:
  """How many of the first `size` bytes are whole lines."""
  while size:
    start = max(size - (1 << 16), 0)
    file.seek(start)
    if end := file.read(size - start).rfind(b'\n') + 1:
      size = start + end
      break
    size = start
  file.seek(0, 2)
  return size


def _guarded(method: str) -> Any:
  def call(self: 'Guarded', *args: Any, **kwargs: Any) -> None:
    self.call(method, *args, **kwargs)

  return call


class Guarded(metric_writers.MetricWriter):
  """A writer that, when it fails or hangs, is told of once and left out.

  Args:
    writer: any.
    thread: where it is called, if not by the caller.
  """

  def __init__(
    self, writer: metric_writers.MetricWriter, thread: OwnThread | None = None
  ):
    self.writer = writer
    self._thread = thread
    self._failed = False

  def call(self, method: str, *args: Any, **kwargs: Any) -> None:
    if not self._failed:
      self._try(method, *args, **kwargs)

  def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
    call = functools.partial(getattr(self.writer, method), *args, **kwargs)
    closing = method == 'close'
    try:
      if self._thread:
        wait = PATIENCE_AT_END_SECONDS if closing else PATIENCE_SECONDS
        self._thread(call, wait)
      else:
        call()
    except (Exception, SystemExit) as error:  # Whatever somebody's raises.
      if not self._failed:
        _warn(type(self.writer).__name__, error)
        # What it has so far is kept, if it can be.
        self._failed = True
        if not closing and not isinstance(error, TimeoutError):
          self._try('close')
    if closing and self._thread:
      self._thread.end()

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

  A writer that fails is told of once, and left out: the run goes on. Those
  that were given have a thread each, so that one that hangs is left out too.

  Attributes:
    clu: all of them as one, for callbacks.
    splits: the names before a slash that are splits.
  """

  def __init__(
    self,
    workdir: pathlib.Path | None,
    extra: Sequence[metric_writers.MetricWriter] = (),
    board: TensorBoardLayout | None = None,
  ):
    self._workdir = workdir
    self._board = board or TensorBoardLayout()
    self._file: MetricsFile | None = None
    self._size = 0
    self._run: Guarded | None = None
    self._extra = [
      Guarded(writer, OwnThread(type(writer).__name__)) for writer in extra
    ]
    self._told: set[str] = set()
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
    self._file = self._run = None
    self._size = file_size
    path = self._workdir / 'metrics.jsonl'
    try:
      self._file = MetricsFile(path, file_size)
    except OSError as error:
      _warn(path.name, error)
    try:
      writer = RunWriter(self._workdir, self._board, step, self.splits)
    except Exception as error:  # A file is in the way, a text is not UTF-8.
      _warn(RunWriter.__name__, error)
    else:
      self._run = Guarded(writer)
      self.clu = metric_writers.MultiWriter([self._run, *self._extra])

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Numbers are scalars, so are those of a vector; rows are histograms.

    What is not `is_for_files` is left out; so is what is neither, nor JSON, and
    told of once.
    """
    scalars, histograms = {}, {}
    whole = {}
    for name, value in metrics.items():
      try:
        array = np.asarray(value)
        if not is_for_files(array):
          continue
        value = value.tolist() if hasattr(value, 'tolist') else value
        to_json(value)
      except (TypeError, ValueError) as error:
        self._tell_once(f'the metric {name!r} is left out: {error}', name)
        continue
      whole[name] = value
      if isinstance(value, (int, float)):
        scalars[name] = value
      elif isinstance(value, list):
        parts = scalars if array.ndim == 1 else histograms
        parts.update({f'{name}/{i}': part for i, part in enumerate(array)})
    self._write_line(step, whole)
    self.clu.write_scalars(step, scalars)
    if histograms:
      self.clu.write_histograms(step, histograms)
    self.clu.flush()

  def _write_line(self, step: int, metrics: dict[str, Any]) -> None:
    if self._file:
      try:
        self._file.write(step, metrics)
      except OSError as error:
        self._tell_once(
          f'metrics.jsonl could not be written from step {step} on: {error}; '
          'the run goes on, and writes it again as soon as it can',
          'metrics.jsonl',
        )

  def _tell_once(self, text: str, what: str) -> None:
    if what not in self._told:
      log.warning(text)
    self._told.add(what)

  def file_size(self) -> int:
    """Bytes of metrics.jsonl so far; what it was, if it cannot be opened."""
    return self._file.tell() if self._file else self._size

  def close(self, status: str) -> None:
    """`status`: of the trainer. A run that can go on is not over."""
    if self._run and status != 'interrupted':
      self._run.call('end', success=status == 'done')
    self.clu.close()
    if self._file:
      try:
        self._file.close()
      except OSError as error:  # What was trained is saved already.
        _warn('metrics.jsonl', error)


def _warn(name: str, error: BaseException) -> None:
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
