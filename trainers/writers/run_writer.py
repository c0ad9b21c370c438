"""How TensorBoard shows a run, and the files that it reads."""

from collections.abc import Mapping
import logging
import pathlib
from typing import Any, NamedTuple

from clu import metric_writers

from trainers.writers import event_files
from trainers.writers.tensorboard import Array, SummaryWriter

log = logging.getLogger(__name__)


class Chart(NamedTuple):
  """Where TensorBoard shows a metric.

  Attributes:
    tag: 'group/name'.
    description: Markdown, beside the chart.
  """

  tag: str
  description: str = ''


class TensorBoardLayout(NamedTuple):
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
    # One for all directories: their events are drawn on the same charts.
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
    self._files[self.SESSION] = SummaryWriter(
      directory, self.SESSION, clock=self._clock
    )
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
        self._workdir / directory,
        descriptions=self._descriptions,
        clock=self._clock,
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
