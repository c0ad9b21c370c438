"""TensorBoard layout of a run, and the event files of the run."""

from collections.abc import Mapping
import logging
import pathlib
from typing import Any, NamedTuple

from clu import metric_writers

from trainers.writers import event_files
from trainers.writers.tensorboard import Array, SummaryWriter

log = logging.getLogger(__name__)


class Chart(NamedTuple):
  """TensorBoard chart of a metric.

  Attributes:
    tag: Tag of the chart, 'group/name'.
    description: Markdown text beside the chart.
  """

  tag: str
  description: str = ''


class TensorBoardLayout(NamedTuple):
  """Presentation of a run in TensorBoard.

  Attributes:
    charts: Chart of each metric, by metric name without split. Other metrics
      keep their names as tags.
    layout: Charts of the custom-scalars tab, {category: {chart: regex of its
      tags}}.
    hparams: Hyper-parameters, a flat dict of numbers, booleans and strings.
    split: Split whose scalars TensorBoard lists beside the hyper-parameters,
      for sorting runs.
  """

  charts: Mapping[str, Chart] = {}
  layout: Mapping[str, Mapping[str, str]] = {}
  hparams: Mapping[str, Any] = {}
  split: str = 'val'


class RunWriter(metric_writers.MetricWriter):
  """MetricWriter of CLU that writes the event files of a run.

  The metric '<split>/<name>' is written as '<name>' in <workdir>/<split>/.
  TensorBoard draws equal tags of several directories on one chart.

  Args:
    workdir: Directory of the run.
    board: Presentation of the run in TensorBoard.
    step: Last step that is kept. Later steps in earlier files are superseded.
    splits: Prefixes of metric names that are splits. The caller may add more.
  """

  SESSION = '0.session'  # Sorts before the other files of its directory.

  def __init__(
    self,
    workdir: pathlib.Path,
    board: TensorBoardLayout,
    step: int,
    splits: set[str],
  ):
    self._workdir = workdir
    self._board = board
    self._step = step
    self._splits = splits
    # Directories share a clock: their events are drawn on the same charts.
    self._clock = event_files.WallClock(
      file
      for directory in (workdir, *workdir.glob('*/'))
      for file in event_files.in_directory(directory)
    )
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
    log.warning(
      'step %d: audio is not supported, dropped: %s', step, ', '.join(audios)
    )

  def write_videos(self, step: int, videos: Mapping[str, Array]) -> None:
    log.warning(
      'step %d: video is not supported, dropped: %s', step, ', '.join(videos)
    )

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Adds hyper-parameters to those of the run.

    TensorBoard sorts runs by the scalars of the directory that holds the
    hyper-parameters: it is the directory of `TensorBoardLayout.split`.
    TensorBoard uses the first values, and the first end of a run, that it
    reads. The hyper-parameters thus have a separate file, which each call
    rewrites.

    Args:
      hparams: Flat dict of numbers, booleans and strings.
    """
    self._hparams.update(hparams)
    directory = self._workdir / self._board.split
    if self.SESSION in self._files:
      self._files[self.SESSION].close()
    self._files[self.SESSION] = SummaryWriter(
      directory, self.SESSION, clock=self._clock
    )
    self._files[self.SESSION].write_hparams(self._hparams)

  def end(self, success: bool) -> None:
    """Records the end of the run; only `close` may follow.

    Args:
      success: Whether the run is done; False marks it as failed.
    """
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
        self._workdir / directory,
        descriptions=self._descriptions,
        clock=self._clock,
      )
      file.start_session(self._step)
      self._files[directory] = file
    return self._files[directory]

  def _route(self, name: str) -> tuple[SummaryWriter, str]:
    """Returns the writer and the tag of the metric `name`."""
    split, _, metric = name.partition('/')
    if split not in self._splits or not metric:
      split, metric = '', name
    head, slash, rest = metric.partition('/')
    chart = self._board.charts.get(head, Chart(head))
    return self._file(split), chart.tag + slash + rest
