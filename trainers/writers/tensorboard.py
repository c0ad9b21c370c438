"""Writer of TensorBoard event files, with TensorBoard's protocol buffers."""

# Pyright cannot see the classes: protocol buffers create them on import.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Mapping
import os
import pathlib
import re
import socket
from typing import Any

from clu.metric_writers import interface
import numpy as np
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.scalar import metadata as scalar_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from trainers.writers import event_files, png

Array = interface.Array


class SummaryWriter(interface.MetricWriter):
  """MetricWriter of CLU that writes a new event file in `logdir`.

  Scalars, histograms, images, texts and hyper-parameters have the format of
  TensorFlow's v2 summaries. Audio and video are not supported.

  Args:
    logdir: Directory of the file, created if missing.
    name: Name of the file, after 'events.out.tfevents.'; '' selects a unique
      name that sorts after the existing files.
    descriptions: Markdown text beside each chart, {tag: text}.
    clock: Clock that dates the events; None creates one that continues from
      the newest event in `logdir`.
  """

  def __init__(
    self,
    logdir: str | os.PathLike,
    name: str = '',
    descriptions: Mapping[str, str] | None = None,
    clock: event_files.WallClock | None = None,
  ):
    logdir = pathlib.Path(logdir)
    logdir.mkdir(parents=True, exist_ok=True)
    self._clock = clock or event_files.WallClock(
      event_files.in_directory(logdir)
    )
    now = self._clock()
    if name:
      file = (logdir / f'{event_files.PREFIX}{name}').open('wb')
    else:
      host = re.sub(r'[^\w.-]', '_', socket.gethostname())
      source = f'{host}.{os.getpid()}'
      file = (logdir / event_files.next_name(logdir, now, source)).open('xb')
    self._records = RecordWriter(file)
    self._descriptions = descriptions or {}
    self._event(event_pb2.Event(wall_time=now, file_version='brain.Event:2'))

  def start_session(self, step: int) -> None:
    """Makes TensorBoard hide events of earlier files after `step`.

    Args:
      step: Last step that is kept; training repeats the later ones.
    """
    session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._event(
      event_pb2.Event(
        wall_time=self._clock(), step=step + 1, session_log=session
      )
    )
    self.flush()

  def write_summaries(
    self,
    step: int,
    values: Mapping[str, Array],
    metadata: Mapping[str, Any] | None = None,
  ) -> None:
    for tag, value in values.items():
      tensor = make_tensor_proto(np.asarray(value))
      self._tensor(step, tag, tensor, metadata[tag] if metadata else None)

  def write_scalars(
    self, step: int, scalars: Mapping[str, interface.Scalar]
  ) -> None:
    for tag, value in scalars.items():
      metadata = scalar_metadata.create_summary_metadata('', self._about(tag))
      tensor = TensorProto(dtype=DT_FLOAT, float_val=[float(np.asarray(value))])
      self._tensor(step, tag, tensor, metadata)

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Array],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    for tag, array in arrays.items():
      metadata = histogram_metadata.create_summary_metadata(
        '', self._about(tag)
      )
      values = np.asarray(array, np.float64).ravel()
      values = np.clip(values[np.isfinite(values)], -1e300, 1e300)
      count = (num_buckets or {}).get(tag, 30)
      try:
        sizes, edges = np.histogram(values, count)
      except ValueError:  # Values are too close for floats between the edges.
        sizes, edges = np.histogram(values, 1)
      rows = np.stack([edges[:-1], edges[1:], sizes], axis=1)
      tensor = make_tensor_proto(rows.astype(np.float64))
      tensor.dtype = DT_DOUBLE
      self._tensor(step, tag, tensor, metadata)

  def write_images(self, step: int, images: Mapping[str, Array]) -> None:
    """Writes images.

    Args:
      step: Step of the images.
      images: Images by tag, `[N, H, W, C]` or `[H, W, C]`, with C = 1 or 3;
        uint8, or floats in [0, 1].
    """
    for tag, array in images.items():
      images_of_tag = png.pixels(array)
      height, width = images_of_tag.shape[1:3]
      metadata = image_metadata.create_summary_metadata(
        '', self._about(tag), converted_to_tensor=None
      )
      strings = [str(width).encode(), str(height).encode()]
      strings += [png.encode(image) for image in images_of_tag]
      self._tensor(step, tag, make_tensor_proto(strings), metadata)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for tag, text in texts.items():
      metadata = text_metadata.create_summary_metadata('', self._about(tag))
      tensor = make_tensor_proto([text.encode()])
      self._tensor(step, tag, tensor, metadata)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes hyper-parameters.

    Args:
      hparams: Flat dict of numbers, booleans and strings.
    """
    # Without a group name, TensorBoard lists each run by its directory. The
    # default name is a hash of the values, which merges runs of equal values.
    self._summary(
      0,
      hparams_summary.hparams_pb(
        dict(hparams), trial_id='', start_time_secs=self._clock()
      ),
    )
    self.flush()

  def end_hparams(self, success: bool) -> None:
    """Records the end of the run whose hyper-parameters were written.

    Args:
      success: Whether the run is done; False marks it as failed.
    """
    status = api_pb2.STATUS_SUCCESS if success else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(
      status=status, end_time_secs=self._clock()
    )
    content = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    self._tensor(
      0,
      hparams_metadata.SESSION_END_INFO_TAG,
      hparams_metadata.NULL_TENSOR,
      hparams_metadata.create_summary_metadata(content),
    )

  def write_layout(self, layout: Mapping[str, Mapping[str, str]]) -> None:
    """Writes the layout of the custom-scalars tab.

    Args:
      layout: Charts of the tab, {category: {chart: regex of tags}}.
    """
    proto = layout_pb2.Layout(
      category=[
        layout_pb2.Category(
          title=category,
          chart=[
            layout_pb2.Chart(
              title=title,
              multiline=layout_pb2.MultilineChartContent(tag=[tags]),
            )
            for title, tags in charts.items()
          ],
        )
        for category, charts in layout.items()
      ]
    )
    self._tensor(
      0,
      layout_metadata.CONFIG_SUMMARY_TAG,
      make_tensor_proto(proto.SerializeToString()),
      layout_metadata.create_summary_metadata(),
    )

  def write_audios(self, step, audios, *, sample_rate):
    raise ValueError('audio is not supported')

  def write_videos(self, step, videos):
    raise ValueError('video is not supported')

  def flush(self) -> None:
    self._records.flush()

  def close(self) -> None:
    self._records.close()

  def _about(self, tag: str) -> str:
    return self._descriptions.get(tag, '')

  def _tensor(self, step, tag, tensor, metadata) -> None:
    value = summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
    self._summary(step, summary_pb2.Summary(value=[value]))

  def _summary(self, step: int, summary: summary_pb2.Summary) -> None:
    self._event(
      event_pb2.Event(wall_time=self._clock(), step=step, summary=summary)
    )

  def _event(self, event: event_pb2.Event) -> None:
    self._records.write(event.SerializeToString())
