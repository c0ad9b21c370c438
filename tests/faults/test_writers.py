"""A run survives what it tells its metrics to."""

import json
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
from regression import bits, host, make_trainer
from test_writers import tensors

from faults.conftest import fault
from tests.runs import result_of
from trainers import callbacks
from trainers.callbacks import Callback
from trainers.writers import writers
from trainers.writers.tensorboard import SummaryWriter
from trainers.writers.writers import Guarded, MetricsFile, Writer, Writers


@pytest.fixture
def impatient(monkeypatch):
  monkeypatch.setattr(writers, 'PATIENCE_SECONDS', 1)
  monkeypatch.setattr(writers, 'PATIENCE_AT_ENDS_SECONDS', 1)


class Odd(Writer):
  """Calls `fault` in one of its methods; counts what it was called for."""

  def __init__(self, method, fault):
    self.calls = []
    for name in ('write_scalars', 'write_histograms', 'flush', 'close'):
      setattr(
        self, name, self._calling(name, fault if name == method else None)
      )

  def _calling(self, name, fault):
    def call(*args, **kwargs):
      self.calls.append(name)
      if fault:
        fault()

    return call


def fails(error=None):
  raise error or OSError('no space')


def trained(tmp_path, *extra, **changes):
  trainer = make_trainer(
    tmp_path / 'run', writers=extra, log_interval=1, **changes
  )
  assert trainer.fit() == 'done'
  lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == trainer.num_train_steps
  return trainer


SURVIVES = 'the run ends as without it; the first error is told, once'


@pytest.mark.parametrize(
  ('method', 'error'),
  [
    pytest.param(
      method,
      error,
      marks=fault(
        f'a writer whose {method} raises {type(error).__name__}', SURVIVES
      ),
      id=f'{method}-{type(error).__name__}',
    )
    for method, error in [
      ('write_scalars', OSError('no space')),
      ('flush', KeyError('no space')),
      ('close', RuntimeError('no space')),
      ('write_scalars', SystemExit('no space')),
    ]
  ],
)
def test_a_writer_that_raises(tmp_path, warnings, happened, method, error):
  odd, good = Odd(method, lambda: fails(error)), Odd('', None)
  trainer = trained(tmp_path, odd, good)
  (line,) = warnings()
  assert 'Odd' in line
  assert 'no space' in line
  assert odd.calls.count(method) == 1
  assert odd.calls[-1] == 'close'  # What it has, it may keep.
  assert good.calls.count('write_scalars') == 11
  plain = make_trainer()
  plain.fit()
  assert bits(host(trainer.state)) == bits(host(plain.state))
  happened(f'done, 11 lines of metrics, one warning: {line}')


@pytest.mark.parametrize(
  'method',
  [
    pytest.param(
      method,
      marks=fault(
        f'a writer whose {method} never returns',
        'given up after its time, told once; the run and the process end; '
        'nothing is queued for it',
      ),
    )
    for method in ('write_scalars', 'close')
  ],
)
def test_a_writer_that_hangs(tmp_path, warnings, happened, impatient, method):
  release = threading.Event()
  odd, good = Odd(method, release.wait), Odd('', None)
  start = time.monotonic()
  trained(tmp_path, odd, good)
  seconds = time.monotonic() - start
  release.set()
  (line,) = warnings()
  assert 'Odd failed' in line
  assert 'no answer for 1 s' in line
  assert good.calls.count('write_scalars') == 11
  assert odd.calls.count(method) == 1
  assert method == 'close' or odd.calls == ['write_scalars']
  happened(f'done; {line}')
  assert seconds < 60


@fault(
  'a writer that hangs, in a process',
  'exit code 0 within its time, its last state saved',
)
@pytest.mark.slow
def test_a_writer_that_hangs_does_not_keep_the_process(
  tmp_path, start, happened
):
  (tmp_path / 'hanging.py').write_text(
    'import time\n'
    'from trainers import writers\n'
    'writers.PATIENCE_SECONDS = writers.PATIENCE_AT_ENDS_SECONDS = 2\n'
    'class Hangs(writers.Writer):\n'
    '  def write_scalars(self, step, scalars):\n'
    '    time.sleep(1e6)\n'
  )
  run = start(
    tmp_path / 'run',
    '--config.writers.mine.type=hanging.Hangs',
    env={'PYTHONPATH': str(tmp_path)},
  )
  assert run.end() == 0
  assert run.output.count('Hangs failed') == 1
  assert result_of(tmp_path / 'run')['status'] == 'done'
  happened('exit code 0, one warning')


@fault(
  'a process that was stopped and continued while a writer wrote',
  'the writer is not taken for one that hangs',
)
def test_a_stopped_process_is_no_hanging_writer(happened, monkeypatch):
  """Each wait is used up as by a stop of any length: all but the last."""
  release = threading.Event()
  waited = []

  def wait(futures_, seconds):
    waited.append(seconds)
    if len(waited) == 4:
      release.set()
    return real(futures_, seconds if release.is_set() else 0)

  from trainers.writers import worker_thread  # noqa: PLC0415

  real = worker_thread.futures.wait
  monkeypatch.setattr(worker_thread.futures, 'wait', wait)
  thread = worker_thread.OwnThread('x')
  assert thread(lambda: release.wait() and 'answer', 5) == 'answer'
  thread.end()
  assert waited == [1] * 4
  happened('it waits by the second: a stop costs one of them')


@fault(
  'NaN, infinity and equal or far values in histograms and scalars',
  'written as what is finite of them; TensorBoard stays',
)
@pytest.mark.parametrize(
  'values',
  [
    [math.nan] * 3,
    [1.0, math.inf, -math.inf, math.nan],
    [1.0, np.nextafter(1.0, 2)],
    [-1e308, 1e308],
    [0.0, 5e-324],
    [],
  ],
  ids=str,
)
def test_odd_histograms(tmp_path, happened, values):
  writer = SummaryWriter(tmp_path)
  writer.write_histograms(1, {'load': np.array(values, float)})
  writer.write_scalars(1, {f'x{i}': value for i, value in enumerate(values)})
  writer.close()
  ((step, rows),) = tensors(tmp_path, 'load')
  finite = [min(max(x, -1e300), 1e300) for x in values if math.isfinite(x)]
  assert step == 1
  assert np.isfinite(rows).all()
  assert rows[:, 2].sum() == len(finite)
  for x in finite:
    left, right, count = rows.T
    assert ((left <= x) & (x <= right) & (count > 0)).any()
  happened('written')


@fault(
  'metrics of NaN, of a kind that JSON has not, ragged, of no UTF-8',
  'the line is written without what it cannot hold, which is told once',
)
def test_odd_metrics(tmp_path, warnings, happened):
  class Adds(Callback):
    def on_log(self, loop, metrics):
      metrics.update(
        {
          'nan': math.nan,
          'object': {1, 2},
          'ragged': [[1.0], [1.0, 2.0]],
          'bytes': b'x',
          'name \udcff': 1.0,
          'load': [[math.nan, 1.0], [2.0, 2.0]],
        }
      )

  trained(tmp_path, callbacks=[Adds()])
  path = tmp_path / 'run' / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  for line in lines:
    assert line['nan'] is None
    assert line['load'] == [[None, 1.0], [2.0, 2.0]]
    assert line['name \udcff'] == 1.0
    assert 'train/loss' in line
    assert not {'object', 'bytes'} & set(line)
  assert sum("'object'" in text for text in warnings()) == 1
  happened(f'11 lines; told once: {warnings()[0]}')


# Full, or in the way.


@fault(
  'metrics.jsonl on a full disk (/dev/full)',
  'warns once, and goes on; the last state is saved',
)
def test_metrics_on_a_full_disk(tmp_path, warnings, happened):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'metrics.jsonl').symlink_to('/dev/full')
  trainer = make_trainer(
    tmp_path / 'run', log_interval=1, callbacks=[callbacks.Checkpoints(4)]
  )
  assert trainer.fit() == 'done'
  (line,) = warnings()
  assert 'metrics.jsonl' in line
  assert 'step 1:' in line
  assert 'No space left' in line
  happened(f'done; one warning: {line[:100]}')


@fault(
  'metrics.jsonl on a disk that is full for three lines',
  'whole lines only, and lines again once there is room',
)
def test_room_comes_back(tmp_path, warnings, happened, monkeypatch):
  real, calls = MetricsFile.write, []

  def write(self, step, metrics):
    calls.append(step)
    if 3 <= step <= 5:
      self._file.write(b'{"step": ')  # What there was room for.
      os.truncate(self._file.name, self.tell() - 9)
      raise OSError(28, 'No space left on device')
    real(self, step, metrics)

  monkeypatch.setattr(MetricsFile, 'write', write)
  make_trainer(tmp_path, log_interval=1).fit()
  text = (tmp_path / 'metrics.jsonl').read_text()
  steps = [json.loads(line)['step'] for line in text.splitlines()]
  assert steps == [1, 2, 6, 7, 8, 9, 10, 11]
  assert len(warnings()) == 1
  happened('lines 1, 2 and 6 to 11; one warning')


@pytest.mark.parametrize(
  ('name', 'make', 'part'),
  [
    pytest.param(
      name,
      make,
      part,
      marks=fault(what, 'told; the run goes on without it'),
      id=what,
    )
    for what, name, make, part in [
      (
        'a directory in the place of metrics.jsonl',
        'metrics.jsonl',
        lambda path: path.mkdir(),
        'metrics.jsonl',
      ),
      (
        "a file in the place of TensorBoard's directory",
        'val',
        lambda path: path.write_text('mine'),
        'RunWriter',
      ),
    ]
  ],
)
def test_what_is_in_the_way(tmp_path, warnings, happened, name, make, part):
  from trainers.writers.run_writer import TensorBoardLayout  # noqa: PLC0415

  (tmp_path / 'run').mkdir()
  make(tmp_path / 'run' / name)
  trainer = make_trainer(
    tmp_path / 'run', board=TensorBoardLayout(hparams={'lr': 0.1})
  )
  assert trainer.fit() == 'done'
  (line,) = warnings()
  assert part in line
  happened(line.replace(str(tmp_path), '...')[:140])


# metrics.jsonl, edited.


@pytest.mark.parametrize(
  ('edit', 'left', 'told'),
  [
    pytest.param(
      edit, left, told, marks=fault(what, 'whole lines; told'), id=what
    )
    for what, edit, left, told in [
      (
        'metrics.jsonl with a line made longer',
        lambda raw: b'{"step": 1, "a": "edited"}\n' + raw,
        3,
        'edited',
      ),
      (
        'metrics.jsonl cut in the middle of a line',
        lambda raw: raw[:-5],
        3,
        'shorter',
      ),
      ('metrics.jsonl emptied', lambda raw: b'', 0, 'shorter'),
      (
        'metrics.jsonl of bytes without a line',
        lambda raw: b'\x00\xff' * 200_000,
        0,
        'edited',
      ),
    ]
  ],
)
def test_metrics_that_were_edited(
  tmp_path, warnings, happened, edit, left, told
):
  path = tmp_path / 'metrics.jsonl'
  file = MetricsFile(path, 0)
  for step in range(1, 5):
    file.write(step, {'loss': 0.5})
  size = file.tell()
  file.close()
  path.write_bytes(edit(path.read_bytes()))
  file = MetricsFile(path, size)
  file.write(5, {'loss': 0.5})
  file.close()
  raw = path.read_bytes()
  lines = [json.loads(line) for line in raw.splitlines()]
  assert lines[-1] == {'step': 5, 'loss': 0.5}
  assert len(lines) == left + 1
  assert any(told in line for line in warnings())
  happened(f'{left} old lines and the new one; "{told}"')


@fault(
  'metrics.jsonl that cannot be opened, for one start',
  'nothing of it is cut off later',
)
def test_a_size_that_is_not_known_is_as_it_was(tmp_path, happened):
  (tmp_path / 'metrics.jsonl').mkdir()
  kept = Writers(tmp_path)
  kept.start(3, 1234)
  assert kept.file_size() == 1234
  kept.close('done')
  happened('the next checkpoint records 1234 bytes, as the one before')


@fault('SIGTERM while a writer hangs', 'saved, exit code 75, within its time')
@pytest.mark.slow
def test_a_signal_while_a_writer_hangs(tmp_path, start, happened):
  (tmp_path / 'hanging.py').write_text(
    'import pathlib, time\n'
    'from trainers import writers\n'
    'class Hangs(writers.Writer):\n'
    '  def __init__(self, workdir):\n'
    '    self.mark = workdir / "hangs"\n'
    '  def write_scalars(self, step, scalars):\n'
    '    self.mark.touch()\n'
    '    time.sleep(1e6)\n'
  )
  run = start(
    tmp_path / 'run',
    '--config.writers.mine.type=hanging.Hangs',
    changes={'num_train_steps': 5000},
    env={'PYTHONPATH': str(tmp_path)},
  )
  run.until((tmp_path / 'run' / 'hangs').exists)
  run.signal(signal.SIGTERM)
  begin = time.monotonic()
  assert run.end() == 75
  seconds = time.monotonic() - begin
  assert seconds < writers.PATIENCE_SECONDS + 25
  assert result_of(tmp_path / 'run')['status'] == 'interrupted'
  happened('exit code 75, saved')


def test_a_failed_writer_is_not_called_again():
  odd = Odd('write_scalars', fails)
  guarded = Guarded(odd)
  for _ in range(3):
    guarded.write_scalars(1, {})
    guarded.flush()
  guarded.close()
  assert odd.calls == ['write_scalars', 'close']
