"""Writers of a run's metrics: metrics.jsonl, TensorBoard and plug-ins."""

from collections.abc import Mapping, Sequence
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


# Time limit of a call of a plug-in writer: less than a preempted machine leaves
# for saving. The first call, `start`, may connect to a server. The last call,
# `close`, may have much data to send.
PATIENCE_SECONDS = 15
PATIENCE_AT_ENDS_SECONDS = 60


class MetricsFile:
  """File metrics.jsonl, with one JSON object per line, `step` first.

  A checkpoint records the size of the file. Resuming truncates the file to that
  size, so that no step is written twice. If the file was edited since, an
  incomplete last line is removed, too.

  Args:
    path: Path of the file.
    size: Number of bytes to keep.
  """

  def __init__(self, path: pathlib.Path, size: int):
    self._file = path.open('a+b', buffering=0)
    if self._file.tell() < size:
      log.warning('%s is shorter than at the checkpoint: lines are lost', path)
    size = min(size, self._file.tell())
    whole = _whole_lines(self._file, size)
    if whole < size:
      log.warning('%s was edited: an incomplete line is removed', path)
    if self._file.tell() > whole:
      self._file.truncate(whole)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes a line. A partial line, of a full disk, is removed again.

    Args:
      step: Step of the metrics.
      metrics: JSON values by name.

    Raises:
      OSError: The line could not be written.
    """
    size = self.tell()
    line = to_json({'step': step, **metrics}) + '\n'
    raw = line.encode(errors='backslashreplace')
    try:
      if self._file.write(raw) < len(raw):  # A full disk took a part.
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
  """Returns how many of the first `size` bytes are complete lines."""
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
  """Wrapper that logs the first failure of a writer, then skips the writer.

  Args:
    writer: Metric writer that may raise or hang.
    thread: Thread that makes the calls; None calls from the caller's thread.
  """

  def __init__(
    self, writer: metric_writers.MetricWriter, thread: OwnThread | None = None
  ):
    self.writer = writer
    self._thread = thread
    self._failed = False

  def call(self, method: str, *args: Any, **kwargs: Any) -> None:
    """Calls a method of the writer, unless the writer has failed."""
    if not self._failed:
      self._try(method, *args, **kwargs)

  def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
    call = functools.partial(getattr(self.writer, method), *args, **kwargs)
    closing = method == 'close'
    is_patient = method in ('start', 'close')
    try:
      if self._thread:
        wait = PATIENCE_AT_ENDS_SECONDS if is_patient else PATIENCE_SECONDS
        self._thread(call, wait)
      else:
        call()
    except (Exception, SystemExit) as error:  # A plug-in may raise anything.
      if not self._failed:
        _warn(type(self.writer).__name__, error)
        # Closing lets the writer keep the metrics that it has.
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
  """All writers of a run's metrics.

  The first failure of a writer is logged, then the writer is skipped, and the
  run continues. Each writer in `extra` has a thread, so that one that hangs can
  be skipped, too.

  Args:
    workdir: Directory of the run; None writes no files.
    extra: Further writers, for example plug-ins.
    board: Presentation of the run in TensorBoard; None selects the default.

  Attributes:
    clu: MetricWriter that forwards to all writers but metrics.jsonl.
    splits: Prefixes of metric names that are splits.
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
    self._warned: set[str] = set()
    self.splits = {'train', self._board.split}
    self.clu = metric_writers.MultiWriter(self._extra)

  def start(self, step: int, file_size: int) -> None:
    """Opens the files and starts the writers, also after each rollback.

    Args:
      step: Last step that is kept; later steps in the files are superseded.
      file_size: Bytes of metrics.jsonl that are kept.
    """
    if self._workdir is not None:
      self._open(self._workdir, step, file_size)
    for extra in self._extra:
      if isinstance(extra.writer, Writer):
        extra.call('start', step, self._board.hparams)

  def _open(self, workdir: pathlib.Path, step: int, file_size: int) -> None:
    if self._run:
      self._run.call('close')
    if self._file:
      self._file.close()
    self._file = self._run = None
    self._size = file_size
    path = workdir / 'metrics.jsonl'
    try:
      self._file = MetricsFile(path, file_size)
    except OSError as error:
      _warn(path.name, error)
    try:
      writer = RunWriter(workdir, self._board, step, self.splits)
    except Exception as error:  # For example: a directory cannot be created.
      _warn(RunWriter.__name__, error)
    else:
      self._run = Guarded(writer)
      self.clu = metric_writers.MultiWriter([self._run, *self._extra])

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes metrics to every writer.

    A number is written as a scalar, a vector as a scalar per element, and a
    matrix as a histogram per row. Arrays of more axes are skipped; see
    `is_for_files`. A metric that JSON cannot hold is skipped with one warning.

    Args:
      step: Step of the metrics.
      metrics: Numbers, arrays or JSON values by name.
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
        self._warn_once(f'metric {name!r} is skipped: {error}', name)
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
        self._warn_once(
          f'metrics.jsonl could not be written at step {step}: {error}; '
          'training continues, and later steps are tried again',
          'metrics.jsonl',
        )

  def _warn_once(self, text: str, subject: str) -> None:
    if subject not in self._warned:
      log.warning(text)
    self._warned.add(subject)

  def file_size(self) -> int:
    """Returns the size of metrics.jsonl, in bytes, for a checkpoint.

    If the file could not be opened, its size at the last start is returned.
    """
    return self._file.tell() if self._file else self._size

  def close(self, status: str) -> None:
    """Closes every writer.

    Args:
      status: Status of the trainer. An interrupted run can resume: its end is
        not recorded.
    """
    if self._run and status != 'interrupted':
      self._run.call('end', success=status == 'done')
    self.clu.close()
    if self._file:
      try:
        self._file.close()
      except OSError as error:  # Not fatal: the checkpoint is saved already.
        _warn('metrics.jsonl', error)


def _warn(name: str, error: BaseException) -> None:
  log.warning('%s failed; the run continues without it: %r', name, error)


class Writer(metric_writers.MetricWriter):
  """Base class of plug-in writers, whose methods ignore their arguments.

  A plug-in overrides the methods that it needs.
  """

  def start(self, step: int, hparams: Mapping[str, Any]) -> None:
    """Begins the run, a resumed run, or the steps after a rollback.

    It runs before all other calls.

    Args:
      step: Last step that is kept. Records of later steps are superseded:
        training repeats these steps.
      hparams: Hyper-parameters of the run, a flat dict of numbers, booleans and
        strings.
    """

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
