"""Where metrics go: metrics.jsonl, and CLU writers (TensorBoard)."""

from collections.abc import Mapping, Sequence
import logging
import os
import pathlib
from typing import Any, NamedTuple

from clu import metric_writers
import numpy as np

from trainers.files import to_json
from trainers.tensorboard import Array, SummaryWriter

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


class Chart(NamedTuple):
  """Where TensorBoard shows a metric.

  Attributes:
    tag: 'group/name'.
    description: Markdown, beside the chart.
  """

  tag: str
  description: str = ''


class Board(NamedTuple):
  """How TensorBoard shows a run.

  Attributes:
    charts: of metrics, without their split; others keep their names.
    layout: of the custom-scalars tab: {category: {chart: regex of its tags}}.
    hparams: flat; numbers, booleans and strings.
    split: whose scalars stand beside the hyper-parameters: runs can be sorted
      by them.
  """

  charts: Mapping[str, Chart] = {}
  layout: Mapping[str, Mapping[str, str]] = {}
  hparams: Mapping[str, Any] = {}
  split: str = 'val'


class RunWriter(metric_writers.MetricWriter):
  """CLU's MetricWriter, to the event files of a run.

  '<split>/<name>' goes to the directory <workdir>/<split>/, without the split:
  TensorBoard draws what has the same name in several directories on one chart.

  Args:
    workdir: of the run.
    board: how it is shown.
    step: what earlier files say of the steps after it is superseded.
    splits: the names before a slash that are splits; more may be added.
  """

  SESSION = '0.session'  # Sorts before the other files of its directory.

  def __init__(
    self, workdir: pathlib.Path, board: Board, step: int, splits: set[str]
  ):
    self._workdir = workdir
    self._board = board
    self._step = step
    self._splits = splits
    self._files: dict[str, SummaryWriter] = {}
    self._hparams: dict[str, Any] = {}
    self._descriptions = {c.tag: c.description for c in board.charts.values()}
    if board.hparams:
      self.write_hparams(board.hparams)
    if board.layout:
      self._file('').write_layout(board.layout)

  def write_summaries(
    self,
    step: int,
    values: Mapping[str, Array],
    metadata: Mapping[str, Any] | None = None,
  ) -> None:
    for name, value in values.items():
      file, tag = self._route(name)
      own = {tag: metadata[name]} if metadata else None
      file.write_summaries(step, {tag: value}, own)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for name, value in scalars.items():
      file, tag = self._route(name)
      file.write_scalars(step, {tag: value})

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Array],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    for name, array in arrays.items():
      file, tag = self._route(name)
      count = (num_buckets or {}).get(name)
      file.write_histograms(step, {tag: array}, {tag: count} if count else None)

  def write_images(self, step: int, images: Mapping[str, Array]) -> None:
    for name, image in images.items():
      file, tag = self._route(name)
      file.write_images(step, {tag: image})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      file, tag = self._route(name)
      file.write_texts(step, {tag: text})

  def write_audios(
    self, step: int, audios: Mapping[str, Array], *, sample_rate: int
  ) -> None:
    log.warning('step %d: no audio is written: %s', step, ', '.join(audios))

  def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
    log.warning('step %d: no video is written: %s', step, ', '.join(videos))

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Adds to the hyper-parameters.

    They are in the directory of the split: TensorBoard offers every scalar
    below them for sorting. They are in a file of their own, which is made
    anew: TensorBoard believes the first values, and the first end, that it
    reads.
    """
    self._hparams.update(hparams)
    directory = self._workdir / self._board.split
    if self.SESSION in self._files:
      self._files[self.SESSION].close()
    self._files[self.SESSION] = SummaryWriter(directory, self.SESSION)
    self._files[self.SESSION].write_hparams(self._hparams)

  def end(self, success: bool) -> None:
    """Of the run: after this comes close()."""
    if self.SESSION in self._files:
      self._files[self.SESSION].end_hparams(success)

  def flush(self) -> None:
    for file in self._files.values():
      file.flush()

  def close(self) -> None:
    for file in self._files.values():
      file.close()

  def _file(self, directory: str) -> SummaryWriter:
    if directory not in self._files:
      file = SummaryWriter(
        self._workdir / directory, descriptions=self._descriptions
      )
      file.start_session(self._step)
      self._files[directory] = file
    return self._files[directory]

  def _route(self, name: str) -> tuple[SummaryWriter, str]:
    """The file and the tag of what is called `name`."""
    split, _, metric = name.partition('/')
    if split not in self._splits or not metric:
      split, metric = '', name
    head, slash, rest = metric.partition('/')
    chart = self._board.charts.get(head, Chart(head))
    return self._file(split), chart.tag + slash + rest


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
    """Opens the files; what they say of steps after `step` is superseded."""
    if self._workdir is None:
      return
    self._file = MetricsFile(self._workdir / 'metrics.jsonl', file_size)
    self._run = Guarded(
      RunWriter(self._workdir, self._board, step, self.splits)
    )
    self.clu = metric_writers.MultiWriter([self._run, *self._extra])

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Numbers are scalars, so are those of a vector; rows are histograms."""
    metrics = {
      k: v.tolist() if hasattr(v, 'tolist') else v for k, v in metrics.items()
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
