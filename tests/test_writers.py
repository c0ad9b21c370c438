"""metrics.jsonl and TensorBoard's files, read back by TensorBoard."""

import json
import resource
import struct
import zlib

import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.util import tensor_util

from trainers.writers.run_writer import Chart, RunWriter, TensorBoardLayout
from trainers.writers.tensorboard import SummaryWriter
from trainers.writers.writers import Guarded, MetricsFile, Writers

PLUGINS = ('scalars', 'histograms', 'images', 'text')


def read(logdir):
  accumulator = plugin_event_accumulator
  events = accumulator.EventAccumulator(
    str(logdir), tensor_size_guidance=dict.fromkeys(PLUGINS, 0)
  )
  return events.Reload()


def tensors(logdir, tag) -> list[tuple[int, np.ndarray]]:
  """[(step, value)]."""
  return [
    (event.step, tensor_util.make_ndarray(event.tensor_proto))
    for event in read(logdir).Tensors(tag)
  ]


def plugin(logdir, tag) -> str:
  return read(logdir).SummaryMetadata(tag).plugin_data.plugin_name


@pytest.fixture
def writer(tmp_path):
  writer = SummaryWriter(tmp_path / 'log')
  yield writer
  writer.close()


# metrics.jsonl.


def test_half_a_line_is_taken_back(tmp_path):
  """Where there is room for a part, a write raises nothing: it is short."""
  path = tmp_path / 'metrics.jsonl'
  file = MetricsFile(path, 0)
  file.write(1, {'loss': 0.5})
  before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, hard))
  try:
    with pytest.raises(OSError, match='No space'):
      file.write(2, {'loss': 0.25})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
  file.write(3, {'loss': 0.125})
  file.close()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 3]


# TensorBoard.


def test_scalars(tmp_path, writer):
  values = [1.5, np.float32(-2.25), np.array(3), float('nan')]
  for step, value in enumerate(values):
    writer.write_scalars(step, {'a/loss': value, 'other': 0.0})
  writer.flush()
  found = tensors(tmp_path / 'log', 'a/loss')
  assert [step for step, _ in found] == [0, 1, 2, 3]
  np.testing.assert_array_equal(
    [value for _, value in found], [1.5, -2.25, 3, np.nan]
  )
  assert plugin(tmp_path / 'log', 'a/loss') == 'scalars'


def test_histograms(tmp_path, writer):
  """Rows of left edge, right edge, count: all of the finite values."""
  array = np.array([[0.0, 1.0, 2.0, 2.5], [3.0, np.nan, np.inf, 4.0]])
  writer.write_histograms(5, {'load': array}, num_buckets={'load': 4})
  writer.write_histograms(6, {'load': np.full(7, 2)})
  writer.close()
  (step, rows), (_, equal) = tensors(tmp_path / 'log', 'load')
  assert step == 5
  np.testing.assert_array_equal(
    rows, [[0, 1, 1], [1, 2, 1], [2, 3, 2], [3, 4, 2]]
  )
  assert equal[:, 2].sum() == 7
  inside = (equal[:, 0] <= 2) & (equal[:, 1] >= 2) & (equal[:, 2] > 0)
  assert inside.sum() == 1
  assert plugin(tmp_path / 'log', 'load') == 'histograms'


def test_a_histogram_of_nothing_finite_is_empty(tmp_path, writer):
  writer.write_histograms(1, {'load': np.full(3, np.nan)})
  writer.close()
  ((_, rows),) = tensors(tmp_path / 'log', 'load')
  assert rows[:, 2].sum() == 0


def decode_png(data: bytes) -> np.ndarray:
  """uint8[H, W, C] of a PNG without interlacing, its rows unfiltered."""
  assert data[:8] == b'\x89PNG\r\n\x1a\n'
  chunks, position = {}, 8
  while position < len(data):
    (length,) = struct.unpack_from('>I', data, position)
    kind = data[position + 4 : position + 8]
    body = data[position + 8 : position + 8 + length]
    (check,) = struct.unpack_from('>I', data, position + 8 + length)
    assert check == zlib.crc32(kind + body)
    chunks[kind] = body
    position += 12 + length
  assert list(chunks) == [b'IHDR', b'IDAT', b'IEND']
  width, height, depth, color, *methods = struct.unpack(
    '>IIBBBBB', chunks[b'IHDR']
  )
  assert (depth, methods) == (8, [0, 0, 0])
  channels = {0: 1, 2: 3}[color]
  rows = np.frombuffer(zlib.decompress(chunks[b'IDAT']), np.uint8)
  rows = rows.reshape(height, 1 + width * channels)
  assert not rows[:, 0].any()
  return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize('shape', [(2, 5, 3, 1), (2, 5, 3, 3), (5, 3, 3)])
def test_images(tmp_path, writer, shape):
  pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  writer.write_images(4, {'picture': pixels})
  writer.close()
  ((step, strings),) = tensors(tmp_path / 'log', 'picture')
  assert step == 4
  assert [int(strings[0]), int(strings[1])] == [3, 5]  # Width, height.
  images = np.stack([decode_png(data) for data in strings[2:]])
  np.testing.assert_array_equal(images, pixels.reshape(-1, *shape[-3:]))
  assert plugin(tmp_path / 'log', 'picture') == 'images'


def test_floats_are_shades(tmp_path, writer):
  pixels = np.array([-1.0, 0.0, 0.2, 1.0, 7.0]).reshape(1, 5, 1)
  writer.write_images(0, {'picture': pixels})
  writer.close()
  ((_, strings),) = tensors(tmp_path / 'log', 'picture')
  np.testing.assert_array_equal(
    decode_png(strings[2]).ravel(), [0, 0, 51, 255, 255]
  )


def test_texts(tmp_path, writer):
  writer.write_texts(3, {'sample': 'Who is there?\n— Ἕλλην ★'})
  writer.close()
  ((step, strings),) = tensors(tmp_path / 'log', 'sample')
  assert step == 3
  assert [s.decode() for s in strings] == ['Who is there?\n— Ἕλλην ★']
  assert plugin(tmp_path / 'log', 'sample') == 'text'


def test_hyper_parameters(tmp_path, writer):
  hparams = {'lr': 0.1, 'layers': 4, 'bias': True, 'router': 'TopK'}
  writer.write_hparams(hparams)
  writer.close()
  events = read(tmp_path / 'log')
  content = events.SummaryMetadata('_hparams_/session_start_info').plugin_data
  data = plugin_data_pb2.HParamsPluginData.FromString(content.content)
  found = {
    name: getattr(value, value.WhichOneof('kind'))
    for name, value in data.session_start_info.hparams.items()
  }
  assert found == hparams


def test_a_session_supersedes_the_steps_after_its_start(tmp_path):
  """Resumed after step 2: what the first file says of 3 and 4 is gone."""
  for values, start in (({1: 1, 2: 2, 3: 3, 4: 4}, 0), ({3: 30, 5: 50}, 2)):
    writer = SummaryWriter(tmp_path)
    writer.start_session(start)
    for step, value in values.items():
      writer.write_scalars(step, {'loss': value})
    writer.close()
  found = [(step, float(value)) for step, value in tensors(tmp_path, 'loss')]
  assert found == [(1, 1.0), (2, 2.0), (3, 30.0), (5, 50.0)]


@pytest.mark.parametrize(
  ('method', 'arguments'),
  [
    ('write_audios', {'audios': {}, 'sample_rate': 8000}),
    ('write_videos', {'videos': {}}),
  ],
)
def test_what_is_left_out_is_refused(writer, method, arguments):
  with pytest.raises(ValueError, match=method[6:11]):
    getattr(writer, method)(0, **arguments)


# metrics.jsonl.


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_whole_at_once_and_hold_no_nan(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  file = MetricsFile(path, 0)
  file.write(1, {'loss': float('nan'), 'load': [1.0, float('inf')]})
  assert lines(path) == [{'step': 1, 'loss': None, 'load': [1.0, None]}]
  file.write(2, {'loss': 0.1})
  assert lines(path)[1] == {'step': 2, 'loss': 0.1}
  assert file.tell() == path.stat().st_size
  file.close()


def test_superseded_lines_are_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  file = MetricsFile(path, 0)
  file.write(1, {'loss': 1.0})
  size = file.tell()
  file.write(2, {'loss': 2.0})
  file.close()
  with open(path, 'a') as f:
    f.write('{"step": 3, "lo')  # As a kill leaves it.
  file = MetricsFile(path, size)
  assert file.tell() == size
  file.write(2, {'loss': 20.0})
  file.close()
  assert [(m['step'], m['loss']) for m in lines(path)] == [(1, 1.0), (2, 20.0)]


def test_writers_sort_metrics_by_kind(tmp_path):
  writers = Writers(tmp_path)
  writers.start(0, 0)
  metrics = {
    'loss': 0.5,
    'entropy': [0.5, 2.0],
    'load': [[1.0, 2, 2], [3, 4, 5]],
  }
  writers.write(3, metrics)
  size = writers.file_size()
  writers.close('done')
  assert lines(tmp_path / 'metrics.jsonl') == [{'step': 3, **metrics}]
  assert size == (tmp_path / 'metrics.jsonl').stat().st_size
  for tag, value in {'loss': 0.5, 'entropy/0': 0.5, 'entropy/1': 2.0}.items():
    assert plugin(tmp_path, tag) == 'scalars'
    assert tensors(tmp_path, tag) == [(3, value)]
  for tag, last in {'load/0': 2, 'load/1': 5}.items():
    assert plugin(tmp_path, tag) == 'histograms'
    ((_, rows),) = tensors(tmp_path, tag)
    assert (rows[:, 2].sum(), rows[-1, 1]) == (3, last)


def test_what_is_for_pictures_is_left_out(tmp_path):
  """What has three axes is in no file."""
  writers = Writers(tmp_path)
  writers.start(0, 0)
  writers.write(3, {'x': [1.0, 2.0], 'cube': np.zeros((2, 3, 4))})
  writers.close('done')
  assert lines(tmp_path / 'metrics.jsonl') == [{'step': 3, 'x': [1.0, 2.0]}]
  assert read(tmp_path).Tags()['tensors'] == ['x/0', 'x/1']


BOARD = TensorBoardLayout(
  charts={'loss': Chart('loss/total', 'Nats.'), 'load': Chart('routing/load')},
  layout={'first': {'a chart': 'loss/.*'}},
  hparams={'lr': 0.1, 'router': 'TopK'},
)


def run_writer(workdir, step=0):
  return RunWriter(workdir, BOARD, step, {'train', 'val'})


def test_every_kind_goes_to_the_directory_of_its_split(tmp_path):
  """Under the chart's tag; what is no split stays in the run's directory."""
  metadata = SummaryMetadata(
    plugin_data=SummaryMetadata.PluginData(plugin_name='mine')
  )
  writer = run_writer(tmp_path)
  for name in ('val/load/0', 'train/load/0', 'load/0', 'other/load', 'val'):
    writer.write_scalars(1, {name: 1.0})
  writer.write_histograms(1, {'val/h': np.arange(4)}, {'val/h': 2})
  writer.write_images(1, {'val/i': np.zeros((2, 3, 1))})
  writer.write_texts(1, {'val/t': 'text'})
  writer.write_summaries(1, {'val/s': np.arange(2)}, {'val/s': metadata})
  writer.close()

  def tags(directory):
    return set(read(directory).Tags()['tensors'])

  assert tags(tmp_path / 'train') == {'routing/load/0'}
  assert tags(tmp_path) == {
    'routing/load/0',
    'other/load',
    'val',
    'custom_scalars__config__',
  }
  kinds = {
    'routing/load/0': 'scalars',
    'h': 'histograms',
    'i': 'images',
    't': 'text',
    's': 'mine',
  }
  session = {'_hparams_/session_start_info'}
  assert tags(tmp_path / 'val') == {*kinds, *session}
  for tag, kind in kinds.items():
    assert plugin(tmp_path / 'val', tag) == kind
  ((_, rows),) = tensors(tmp_path / 'val', 'h')
  assert len(rows) == 2


def test_what_is_evaluated_is_a_split(tmp_path):
  """The training and the board's split are, from the start."""
  writers = Writers(tmp_path)
  writers.start(0, 0)
  for step in (1, 2):
    for split in ('train', 'val', 'test'):
      writers.clu.write_scalars(step, {f'{split}/x': step})
    writers.splits.add('test')
  writers.close('done')
  for split in ('train', 'val'):
    assert tensors(tmp_path / split, 'x') == [(1, 1), (2, 2)]
  assert tensors(tmp_path, 'test/x') == [(1, 1)]
  assert tensors(tmp_path / 'test', 'x') == [(2, 2)]


def test_directories_are_made_when_needed_and_charts_described(tmp_path):
  writer = RunWriter(tmp_path, BOARD._replace(hparams={}), 0, {'train', 'val'})
  writer.write_scalars(1, {'train/loss': 1.0})
  writer.close()
  assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {'train'}
  metadata = read(tmp_path / 'train').SummaryMetadata('loss/total')
  assert metadata.summary_description == 'Nats.'


def test_resuming_supersedes_steps_in_every_directory(tmp_path):
  for start, values in ((0, {1: 1, 2: 2, 3: 3}), (1, {2: 20})):
    writer = run_writer(tmp_path, start)
    for step, value in values.items():
      writer.write_scalars(step, {f'{k}loss': value for k in ('', 'val/')})
    writer.close()
  for directory in (tmp_path, tmp_path / 'val'):
    assert tensors(directory, 'loss/total') == [(1, 1), (2, 20)]


def session(workdir):
  """(hyper-parameters, status at the end or None)."""
  events = read(workdir / 'val')

  def content(tag):
    data = events.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(data)

  start = content('_hparams_/session_start_info').session_start_info
  ended = '_hparams_/session_end_info' in events.Tags()['tensors']
  end = ended and content('_hparams_/session_end_info').session_end_info.status
  return {
    k: v.number_value or v.string_value for k, v in start.hparams.items()
  }, end


def test_the_session_is_as_the_run_was_last(tmp_path):
  """TensorBoard believes the first it reads: nothing older may be left."""
  for hparams, status, end in (
    ({'lr': 0.1}, 'failed', api_pb2.STATUS_FAILURE),
    ({'lr': 0.1}, 'interrupted', False),
    ({'lr': 0.2, 'steps': 9}, 'done', api_pb2.STATUS_SUCCESS),
  ):
    writers = Writers(tmp_path, board=TensorBoardLayout(hparams=hparams))
    writers.start(0, 0)
    assert session(tmp_path) == (hparams, False)
    writers.clu.write_hparams({'more': 'of it'})
    writers.close(status)
    assert session(tmp_path) == ({**hparams, 'more': 'of it'}, end)


def test_a_callback_cannot_end_a_run_by_writing(tmp_path, caplog):
  class Full(RunWriter):
    def write_images(self, step, images):
      raise OSError('no space')

  guarded = Guarded(Full(tmp_path, BOARD, 0, set()))
  for _ in range(2):
    guarded.write_images(1, {'a': np.zeros((1, 1, 1))})
    guarded.flush()
  assert [r for r in caplog.messages if 'no space' in r] == caplog.messages
  assert len(caplog.messages) == 1


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  writers = Writers(None)
  writers.start(0, 0)
  writers.write(1, {'loss': 0.5})
  assert writers.file_size() == 0
  writers.close('done')
  assert not list(tmp_path.iterdir())
