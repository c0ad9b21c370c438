"""TensorBoard shows what happened, if the machine's clock was set back too."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
from regression import make_trainer
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from faults.conftest import fault
from tests.runs import At, lines_of, result_of
from tests.shrunk import ROOT
from trainers import callbacks
from trainers.writers import event_files
from trainers.writers.run_writer import TensorBoardLayout
from trainers.writers.tensorboard import SummaryWriter
from trainers.writers.writers import Writers

pytestmark = pytest.mark.reported('16')

NOW = 1_790_000_000.0
DAY = 86_400.0
DIRECTORIES = ('', 'train', 'val')
BOARD = TensorBoardLayout(
  hparams={'lr': 0.1}, layout={'first': {'a chart': '.*'}}
)


class Machine:
  """Its clock: `now` seconds, and a hundredth later at each look."""

  def __init__(self):
    self.now, self.tick = NOW, 0.01

  def time(self):
    self.now += self.tick
    return self.now


@pytest.fixture
def machine(monkeypatch):
  machine = Machine()
  monkeypatch.setattr(time, 'time', machine.time)
  return machine


def write(workdir, first, last, start):
  """One start: steps `first` to `last`, each with the start as its value."""
  writers = Writers(workdir, board=BOARD)
  writers.start(first - 1, 0)
  for step in range(first, last + 1):
    names = [f'{d}/x' if d else 'x' for d in DIRECTORIES]
    writers.write(step, dict.fromkeys(names, float(start)))
  writers.close('interrupted')


def read(directory):
  """([(step, value)], wall times) of x, as TensorBoard reads a directory."""
  events = plugin_event_accumulator.EventAccumulator(str(directory)).Reload()
  found = events.Tensors('x')
  values = [float(tensor_util.make_ndarray(e.tensor_proto)) for e in found]
  steps = [e.step for e in found]
  return list(zip(steps, values, strict=True)), [e.wall_time for e in found]


CLOCKS = {
  'set back by a day between two starts': [NOW, NOW - DAY],
  'set back by a second, three times': [NOW, NOW - 1, NOW - 2, NOW - 3],
  'set back, and right again': [NOW, NOW - DAY, NOW + 60],
  'in the year 1970 at the second start': [NOW, 5.0],
  'in the year 1970 at the first starts': [8.5, 11.0, 2.0, NOW],
  'in the year 2100 at the first start': [4_102_444_800.0, NOW, NOW + 60],
  'in the year 2300, then right': [10_413_792_000.0, NOW, NOW + 60],
  'before 1970': [-500.0, -900.0, NOW],
}


@pytest.mark.parametrize(
  'clock',
  [
    pytest.param(
      clock,
      marks=fault(
        f"the machine's clock is {name}",
        'TensorBoard reads steps in order; wall times do not decrease',
      ),
    )
    for name, clock in CLOCKS.items()
  ],
)
def test_events_are_in_the_order_of_the_starts(
  tmp_path, machine, happened, clock
):
  for start, machine.now in enumerate(clock):
    # Each start does again the last two steps of the start before.
    write(tmp_path, 1 + 4 * start, 6 + 4 * start, start)
  last = len(clock) - 1
  expected = [
    (step, float(min((step - 1) // 4, last))) for step in range(1, 7 + 4 * last)
  ]
  for directory in DIRECTORIES:
    found, times = read(tmp_path / directory)
    assert found == expected, directory
    assert times == sorted(times)
    assert times[0] < times[-1]
  happened(f'steps 1 to {expected[-1][0]} in order, of {len(clock)} starts')


@fault(
  'two files in one moment: a clock that stands still, and a rollback',
  'each has a name of its own, and none is overwritten',
)
def test_a_clock_that_stands_still(tmp_path, machine, happened):
  machine.tick = 0.0
  writers = Writers(tmp_path, board=BOARD)
  for start in range(3):  # A run that goes back opens its files again.
    writers.start(2 * start, 0)
    for step in (2 * start + 1, 2 * start + 2):
      writers.write(step, {'x': float(start)})
  writers.close('done')
  assert len(event_files.in_directory(tmp_path)) == 3
  found, _ = read(tmp_path)
  assert found == [(step, float((step - 1) // 2)) for step in range(1, 7)]
  happened('three files; steps 1 to 6 in order')


@fault(
  'files of an older version, or of TensorFlow, with times in the future',
  'new files sort behind them',
)
@pytest.mark.parametrize(
  'name',
  [
    '{:.6f}.host.7',
    '{:.0f}.host.7.3.v2',
    '{:.6f}.zzz.7',
    '{:.0f}',
  ],
)
def test_files_of_others_come_first(tmp_path, machine, happened, name):
  machine.now = NOW + DAY
  older = SummaryWriter(tmp_path, name.format(machine.now))
  older.start_session(0)
  for step in range(1, 7):
    older.write_scalars(step, {'x': 0.0})
  older.close()
  for start, machine.now in ((1, NOW), (2, NOW - DAY), (3, NOW + 2 * DAY)):
    write(tmp_path, 1 + 4 * start, 6 + 4 * start, start)
  found, times = read(tmp_path)
  steps = range(1, 19)
  assert found == [(step, float(min((step - 1) // 4, 3))) for step in steps]
  assert times == sorted(times)
  happened('steps 1 to 18 in order')


@fault(
  'the host has another name at each start, with characters of any kind',
  'names sort by the starts',
)
def test_names_of_hosts(tmp_path, machine, monkeypatch, happened):
  for start, host in enumerate(['zebra', 'ant', '10.0.0.9', 'a/b c', 'é']):
    monkeypatch.setattr(socket, 'gethostname', lambda host=host: host)
    machine.now = NOW - start  # Behind: the name continues from the last one.
    write(tmp_path, start + 1, start + 1, start)
  found, _ = read(tmp_path)
  assert found == [(n + 1, float(n)) for n in range(5)]
  happened('steps 1 to 5 in order')


@fault(
  'the clock is set back by an hour during a run',
  'wall times do not decrease, and no duration is negative',
)
def test_the_clock_moves_during_a_run(tmp_path, machine, happened):
  def jump(loop):
    machine.now -= 3600

  trainer = make_trainer(
    tmp_path,
    num_train_steps=12,
    log_interval=1,
    board=TensorBoardLayout(hparams={'lr': 0.1}),
    callbacks=[
      At(jump, 5),
      callbacks.Progress(1),
      callbacks.Evaluation(2, 'mse'),
      callbacks.Checkpoints(4),
      callbacks.Result({}, 24, 'mse', {}),
    ],
  )
  assert trainer.fit() == 'done'
  for directory, tag in (('train', 'loss'), ('val', 'mse')):
    events = plugin_event_accumulator.EventAccumulator(
      str(tmp_path / directory)
    ).Reload()
    times = [event.wall_time for event in events.Tensors(tag)]
    assert times == sorted(times) and times[-1] - times[0] < 1000
  data = [
    events.SummaryMetadata(f'_hparams_/session_{end}_info').plugin_data.content
    for end in ('start', 'end')
  ]
  first, last = map(plugin_data_pb2.HParamsPluginData.FromString, data)
  start = first.session_start_info.start_time_secs
  assert NOW <= start <= last.session_end_info.end_time_secs < NOW + 1000
  steps = [line['step'] for line in lines_of(tmp_path)]
  assert steps == sorted(steps)
  speeds = [line.get('steps_per_sec', 1) for line in lines_of(tmp_path)]
  result = result_of(tmp_path)
  seconds = [result['train_seconds'], *result['seconds_by_phase'].values()]
  assert min(speeds) > 0 and min(seconds) >= 0
  happened('wall times of 12 steps in order; the session ends after its start')


@fault(
  'the clock is a day back when an interrupted run is resumed',
  'the newest checkpoint is restored; steps are in order for TensorBoard',
)
def test_a_run_is_resumed_in_the_past(tmp_path, machine, happened):
  for num_train_steps, machine.now in ((6, NOW), (12, NOW - DAY), (18, 9.0)):
    trainer = make_trainer(
      tmp_path,
      num_train_steps=num_train_steps,
      log_interval=1,
      callbacks=[callbacks.Checkpoints(2)],
    )
    assert trainer.step == 0
    assert trainer.fit() == 'done'
    assert trainer.num_timed_steps <= 6  # It went on where it was.
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path / 'train'))
  found = events.Reload().Tensors('loss')
  assert [event.step for event in found] == list(range(1, 19))
  times = [event.wall_time for event in found]
  assert times == sorted(times)
  names = [p.name for p in (tmp_path / 'checkpoints').iterdir()]
  assert sorted(map(int, names)) == [16, 18]
  happened('steps 1 to 18 in order, of 3 starts; checkpoints 16 and 18')


@pytest.mark.slow
@fault(
  "the clock is a day back at the second start: what TensorBoard's server says",
  'steps in order',
)
def test_the_server_reads_in_order(tmp_path, machine, happened, monkeypatch):
  for start, machine.now in enumerate((NOW, NOW - DAY, 9.0)):
    write(tmp_path / 'run', 1 + 4 * start, 6 + 4 * start, start)
  monkeypatch.undo()
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'tensorboard.main', '--port=0'),
      f'--logdir={tmp_path}',
    ],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stderr
    found = (re.search(r'http://\S+?:(\d+)', x) for x in process.stderr)
    port = next(match.group(1) for match in found if match)
    query = urllib.parse.urlencode({'run': 'run/train', 'tag': 'x'})
    url = f'http://localhost:{port}/data/plugin/scalars/scalars?{query}'
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end, points = time.monotonic() + 30, []
    while len(points) < 14:
      assert time.monotonic() < end, points
      time.sleep(0.2)
      try:
        with opener.open(url, timeout=20) as response:
          points = json.load(response)
      except urllib.error.HTTPError:  # It has not read the files yet.
        continue
  finally:
    process.terminate()
    process.communicate()
  assert [step for _, step, _ in points] == list(range(1, 15))
  assert [value for *_, value in points] == [0] * 4 + [1] * 4 + [2] * 6
  times = [seconds for seconds, *_ in points]
  assert times == sorted(times)
  happened('steps 1 to 14 in order, of 3 starts')
