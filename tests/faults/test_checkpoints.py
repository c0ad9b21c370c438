"""What is on the disk comes back as it was, or is told; and nothing is lost."""

import errno
import gc
import json
import logging
import math
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import Rows, bits, host, make_trainer

from faults.conftest import same_end, steps_of
from tests.runs import At, metrics_of, result_of
from tests.shrunk import ROOT
from trainers import callbacks
from trainers.callbacks import Callback
from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import reader
from trainers.checkpoint.checkpointer import Checkpointer
from trainers.errors import UserError
from trainers.metrics import Score


def make(workdir, *extra, every=4, **changes):
  """Of 12 steps, with evaluations and checkpoints."""
  listed = [
    callbacks.Evaluation(every, 'mse'),
    *extra,
    callbacks.Checkpoints(every),
    callbacks.Result({}, 24, 'mse', {}),
  ]
  return make_trainer(
    workdir, **{'num_train_steps': 12, 'callbacks': listed, **changes}
  )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of 12 steps with checkpoints 8 and 12: its directory, its state."""
  workdir = tmp_path_factory.mktemp('whole')
  trainer = make(workdir)
  assert trainer.fit() == 'done'
  assert steps_of(workdir) == [8, 12]
  return workdir, bits(host(trainer.state))


@pytest.fixture
def workdir(whole, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(whole[0], tmp_path / 'run'))


@pytest.fixture
def warnings(caplog):
  """warnings() -> what was told, of level WARNING and above."""
  caplog.set_level(logging.INFO)
  return lambda: [
    r.getMessage()
    for r in caplog.records
    if r.levelno >= logging.WARNING and r.name.startswith('trainers')
  ]


def resumes(workdir, whole):
  """Trains on to step 12, and is as the whole run: bitwise."""
  trainer = make(workdir)
  assert trainer.fit() == 'done'
  assert bits(host(trainer.state)) == whole[1]
  assert metrics_of(workdir) == metrics_of(whole[0])
  assert steps_of(workdir) == [8, 12]


# Bits.


def files_with(directory: pathlib.Path, content: bytes) -> list:
  """(file, offset) of what is stored as it is in memory."""
  return [
    (path, path.read_bytes().find(content))
    for path in sorted(directory.rglob('*'))
    if path.is_file() and content in path.read_bytes()
  ]


def flip(path: pathlib.Path, offset: int, bit: int = 0) -> None:
  content = bytearray(path.read_bytes())
  content[offset] ^= 1 << bit
  path.write_bytes(content)


def noise(step, size=3000):
  """Cannot be compressed: it is stored as it is."""
  raw = np.random.default_rng(step).bytes(4 * size)
  values = np.frombuffer(raw, np.int32)
  return {'params': {'w': jnp.asarray(values), 'b': jnp.ones(7)}}


def save_noise(directory, steps=(1, 2), **kwargs):
  checkpointer = Checkpointer(directory, **kwargs)
  for step in steps:
    checkpointer.save(step, noise(step), {'best': None}, None)
  checkpointer.close()


ABSTRACT = jax.eval_shape(lambda: noise(0))


@pytest.mark.fault(
  injected='one bit of an array flipped on the disk',
  promised='the array is named, the older checkpoint used',
)
def test_a_flipped_bit_is_found_and_named(tmp_path, warnings, happened):
  directory = tmp_path / 'checkpoints'
  save_noise(directory)
  values = np.asarray(noise(2)['params']['w'])
  content = values.tobytes()[40:400]
  ((path, offset),) = files_with(directory / '2', content)
  flip(path, offset, 3)
  checkpointer = Checkpointer(directory)
  found = checkpointer.restore(ABSTRACT)
  checkpointer.close()
  assert bits(found.tree) == bits(noise(1))
  (line,) = warnings()
  assert line == (
    'checkpoint 2 is damaged: params.w changed on the disk; using 1'
  )
  assert (tmp_path / 'damaged_checkpoints' / '2').is_dir()
  happened(line)


@pytest.mark.fault(
  injected='one bit of an array flipped, then `evaluate` or `generate`',
  promised='refused where the step is named, else the older one is used',
)
def test_a_reader_finds_a_flipped_bit_too(tmp_path, warnings, happened):
  directory = tmp_path / 'checkpoints'
  save_noise(directory)
  content = np.asarray(noise(2)['params']['w']).tobytes()[40:400]
  ((path, offset),) = files_with(directory / '2', content)
  flip(path, offset)
  with pytest.raises(UserError, match=r'checkpoint 2 is damaged: params\.w'):
    reader.read(directory, '2')
  arrays, meta = reader.read(directory, 'latest')
  assert meta['step'] == 1
  np.testing.assert_array_equal(arrays['params.w'], noise(1)['params']['w'])
  assert 'using 1' in warnings()[0]
  happened('--step=2: exit 2; --step=latest: ' + warnings()[0])


@pytest.mark.fault(
  injected='each of 60 bits flipped, anywhere in a checkpoint',
  promised='the checkpoint bitwise, or the one before: never a wrong number',
)
def test_no_flipped_bit_gives_a_wrong_number(tmp_path, caplog, happened):
  caplog.set_level(logging.CRITICAL)
  source = tmp_path / 'source' / 'checkpoints'
  save_noise(source)
  random = np.random.default_rng(0)
  files = [
    p.relative_to(source) for p in (source / '2').rglob('*') if p.is_file()
  ]
  num_damaged = 0
  for trial in range(60):
    directory = tmp_path / str(trial) / 'checkpoints'
    shutil.copytree(source, directory)
    path = directory / files[trial % len(files)]
    size = path.stat().st_size
    if not size:
      continue
    flip(path, int(random.integers(size)), int(random.integers(8)))
    checkpointer = Checkpointer(directory)
    found = checkpointer.restore(ABSTRACT)
    checkpointer.close()
    assert found.meta['step'] in (1, 2), path
    assert bits(found.tree) == bits(noise(found.meta['step'])), path
    num_damaged += found.meta['step'] == 1
  assert num_damaged > 10
  happened(f'{num_damaged} found, the rest was of no consequence')


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool']
)
def test_a_fingerprint_changes_with_any_bit_and_place(dtype):
  random = np.random.default_rng(0)
  raw = random.integers(0, 2 if dtype == 'bool' else 250, size=24)
  values = raw.astype(jnp.dtype(dtype))
  seen = {arrays_lib.fingerprints({'x': values})['x']}
  num_bits = 1 if dtype == 'bool' else 8 * values.dtype.itemsize
  for i in range(24):
    for bit in range(num_bits):
      flipped = values.copy().view(f'uint{8 * values.dtype.itemsize}')
      flipped[i] ^= 1 << bit
      other = flipped.view(values.dtype)
      seen.add(arrays_lib.fingerprints({'x': other})['x'])
  assert len(seen) == 1 + 24 * num_bits
  rolled = arrays_lib.fingerprints({'x': np.roll(values, 1)})['x']
  assert rolled not in seen


def test_a_device_finds_the_same_fingerprints(monkeypatch):
  arrays = {
    'f': jnp.asarray([1.5, math.nan, -0.0, math.inf]),
    'h': jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    'i': jnp.asarray(-7),
    'b': jnp.asarray([True, False]),
    'u': jnp.arange(5, dtype=jnp.uint8),
  }
  on_host = arrays_lib.fingerprints(arrays)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert arrays_lib.fingerprints(arrays) == on_host


@pytest.mark.fault(
  injected="a digit of a checkpoint's own record (JSON) changed",
  promised='the older checkpoint is used',
)
def test_a_changed_record_is_found(workdir, whole, warnings, happened):
  path = workdir / 'checkpoints' / '12' / 'meta' / 'metadata'
  text = path.read_text()
  meta = json.loads(text)
  path.write_text(
    text.replace(f'"metrics_size": {meta["metrics_size"]}', '"metrics_size": 7')
  )
  assert path.read_text() != text
  resumes(workdir, whole)
  assert 'checkpoint 12 is damaged' in warnings()[0]
  happened(warnings()[0])


# Directories.


def truncate(step: pathlib.Path) -> None:
  for path in (step / 'arrays').rglob('*'):
    if path.is_file() and path.parent.name == 'd':
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_model(step: pathlib.Path) -> None:
  other = step.parent.parent / 'other'
  save_noise(other / 'checkpoints', [12])
  shutil.rmtree(step)
  shutil.move(other / 'checkpoints' / '12', step)


def something_else(step: pathlib.Path) -> None:
  shutil.rmtree(step)
  step.mkdir()
  (step / 'holiday.txt').write_text('photos')


def renamed(step: pathlib.Path) -> None:
  shutil.rmtree(step)
  shutil.copytree(step.parent / '8', step)


def fault(what, promised='the older one is used, bitwise the same end'):
  return pytest.mark.fault(injected=what, promised=promised)


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    pytest.param(
      truncate, 'is damaged', marks=fault('newest checkpoint cut in half')
    ),
    pytest.param(
      lambda step: [shutil.rmtree(step), step.mkdir()],
      'is damaged',
      marks=fault('newest checkpoint emptied'),
    ),
    pytest.param(
      shutil.rmtree, 'missing', marks=fault('newest checkpoint deleted')
    ),
    pytest.param(
      something_else,
      'is damaged',
      marks=fault('a directory of something else in its place'),
    ),
    pytest.param(
      of_another_model,
      'params.b is float32[7]',
      marks=fault("another model's checkpoint in its place"),
    ),
    pytest.param(
      renamed,
      'it is of step 8',
      marks=fault('an older checkpoint copied to its name'),
    ),
  ],
)
def test_an_older_checkpoint_serves(
  workdir, whole, warnings, happened, damage, words
):
  damage(workdir / 'checkpoints' / '12')
  resumes(workdir, whole)
  (line,) = warnings()
  assert line.startswith('checkpoint 12 ')
  assert words in line
  assert line.endswith('; using 8')
  happened(line)


@pytest.mark.fault(
  injected='files and directories of other names between checkpoints',
  promised='they are left alone',
)
def test_other_names_are_left_alone(workdir, whole, warnings, happened):
  directory = workdir / 'checkpoints'
  (directory / 'notes.txt').write_text('mine')
  (directory / '7').write_text('a file')
  for name in ('backup', '012', '²', '12.bak'):
    (directory / name).mkdir()
  trainer = make(workdir)
  assert trainer.fit() == 'done'
  assert bits(host(trainer.state)) == whole[1]
  assert reader.read(directory, 'latest')[1]['step'] == 12
  assert (directory / 'notes.txt').read_text() == 'mine'
  assert (directory / '7').read_text() == 'a file'
  assert not warnings()
  happened('nothing to do; all of them are still there')


@pytest.mark.fault(
  'the files of all arrays are cut or gone, and sixty arrays are read at once',
  'one error, and no traceback of the other reads',
)
@pytest.mark.parametrize('how', ['cut', 'gone'])
def test_one_error_is_all(tmp_path, monkeypatch, capfd, happened, how):
  ignored = []
  monkeypatch.setattr(sys, 'unraisablehook', ignored.append)
  checkpointer = Checkpointer(tmp_path, keep_latest=1)
  arrays = {f'x{i}': noise(i) for i in range(60)}
  checkpointer.save(1, arrays, {'best': None}, None)
  checkpointer.close()
  for file in tmp_path.glob('1/arrays/ocdbt.process_0/d/*'):
    if how == 'cut':
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
      file.unlink()
  with pytest.raises(UserError) as error:
    reader.read(tmp_path, 'latest')
  del error
  time.sleep(0.2)  # Threads of TensorStore would print by now.
  gc.collect()
  assert not ignored
  assert capfd.readouterr().err == ''
  happened('one error alone')


@pytest.mark.fault(
  injected='all checkpoints damaged, or all deleted',
  promised='an error that names each; never trained from the start',
)
@pytest.mark.parametrize('damage', ['cut', 'deleted'])
def test_all_bad_is_an_error(workdir, happened, damage):
  metrics = metrics_of(workdir)
  for step in ('8', '12'):
    path = workdir / 'checkpoints' / step
    {'cut': truncate, 'deleted': shutil.rmtree}[damage](path)
  with pytest.raises(UserError) as error:
    make(workdir).fit()
  text = str(error.value)
  if damage == 'cut':
    assert 'checkpoint 8 is damaged' in text
    assert 'checkpoint 12 is damaged' in text
  else:
    assert f'{workdir}/checkpoints: ' in text
  assert 'choose another --workdir' in text
  assert metrics_of(workdir) == metrics
  assert result_of(workdir)['step'] == 12
  happened(f'exit 2: {error.value.problems[-1].partition("/")[0]}...')


@pytest.mark.fault(
  injected='checkpoints.json edited into nonsense',
  promised='told; the checkpoints are used',
)
@pytest.mark.parametrize('text', ['', '[]', '{"steps": ["x"]}', '{'])
def test_a_damaged_manifest(workdir, whole, warnings, happened, text):
  (workdir / 'checkpoints.json').write_text(text)
  resumes(workdir, whole)
  assert 'checkpoints.json is damaged' in warnings()[0]
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'checkpoints.json').write_text(text)
  with pytest.raises(UserError, match=r'(?s)damaged.*no checkpoint'):
    make(workdir).fit()
  happened('a warning; without any checkpoint an error, not a new start')


# What is kept.


@pytest.mark.fault(
  injected='keep_latest=1, the best early, a restart at every step',
  promised='the newest and the best are always there',
)
@pytest.mark.slow
def test_newest_and_best_survive_restarts(tmp_path, happened):
  def evaluated(loop):
    loop.best = Score(2, -1.0)

  for step in range(1, 9):
    trainer = make(
      tmp_path,
      At(evaluated, 2),
      At(lambda loop: loop.stop('a pause'), step),
      every=1,
      keep_latest=1,
      num_train_steps=20,
    )
    trainer.fit()
    assert steps_of(tmp_path) == sorted({min(step, 2), step})
  happened('after 8 restarts: 2 (the best) and 8 (the newest)')


@pytest.mark.fault(
  injected='evaluations that are NaN',
  promised='none is ever the best',
)
def test_nan_is_never_the_best(tmp_path, happened):
  class Sometimes(Rows):
    num_passes = 0

    def eval_batches(self, split, rows):
      self.num_passes += 1
      for batch in super().eval_batches(split, rows):
        if self.num_passes in (1, 3):
          batch['y'] = batch['y'] * np.nan
        yield batch

  make(tmp_path, dataset=Sometimes(), every=3, keep_latest=1).fit()
  values = [m['val/mse'] for m in metrics_of(tmp_path) if 'val/mse' in m]
  assert [v is None for v in values] == [True, False, True, False]
  result = result_of(tmp_path)
  best = min((v, s) for v, s in zip(values, (3, 6, 9, 12), strict=True) if v)
  assert (result['best_val_loss'], result['best_step']) == best
  happened(f'NaN at steps 3 and 9; the best is of step {best[1]}')


# A full disk.


@pytest.fixture
def full_disk():
  """(fill, empty): between them, no file can grow beyond 100 kB."""
  previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def saved(loop):
    """What is being saved is a matter of the disk as it was."""
    saving = loop and loop.checkpointer._saver._saving
    while saving and not saving.done():
      time.sleep(0.01)

  def fill(loop=None):
    saved(loop)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

  def empty(loop=None):
    saved(loop)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

  yield fill, empty
  empty()
  signal.signal(signal.SIGXFSZ, previous)


class Wide(Rows):
  """So that a checkpoint is larger than the rest: 100,000 parameters."""

  def batch(self, index):
    batch = super().batch(index)
    random = np.random.Generator(np.random.Philox(key=index))
    batch['x'] = random.normal(size=(8, 100_000)).astype(np.float32)
    return batch


@pytest.mark.fault(
  injected='the disk is full for one checkpoint (write fails), then not',
  promised='told; the old one stays, the next save succeeds, the run is done',
)
@pytest.mark.parametrize('keep_latest', [1, 2])
def test_a_disk_that_is_full_for_a_while(
  tmp_path, warnings, happened, full_disk, keep_latest
):
  fill, empty = full_disk
  there = []
  look = At(lambda loop: there.append(steps_of(tmp_path)), 9)

  class Full(Callback):
    def on_train_step_end(self, loop):
      if loop.step == 3:
        fill(loop)
      if loop.step == 7:
        empty(loop)

  # 2 is saved; 4 and 6 are not, and nothing of them is left; 8, 10, 12 are.
  trainer = make(
    tmp_path,
    keep_latest=keep_latest,
    dataset=Wide(),
    callbacks=[Full(), callbacks.Checkpoints(2), look],
  )
  assert trainer.fit() == 'done'
  lines = warnings()
  assert len(lines) == 2
  assert all('a checkpoint could not be saved: step' in x for x in lines)
  assert {4, 6} == {int(x.split('step ')[1].split(':')[0]) for x in lines}
  assert steps_of(tmp_path) == [10, 12][-keep_latest:]
  assert len(list((tmp_path / 'checkpoints').iterdir())) == keep_latest
  again = make_trainer(tmp_path, dataset=Wide(), num_train_steps=12)
  assert again.fit() == 'done'
  assert bits(host(again.state)) == bits(host(trainer.state))
  happened(f'2 lines: {lines[0].split(";")[0][:60]}...; 8, 10, 12 are saved')


@pytest.mark.fault(
  injected='the disk is full while a checkpoint of the same step is replaced',
  promised='the old one is back',
)
def test_a_replacement_that_fails(tmp_path, happened, full_disk):
  fill, empty = full_disk
  directory = tmp_path / 'checkpoints'
  save_noise(directory, [3])
  wide = noise(1, 100_000)
  checkpointer = Checkpointer(directory)
  fill()
  with pytest.raises(Exception, match='step 3'):
    checkpointer.save(3, wide, {}, None)
    checkpointer.wait()
  empty()
  checkpointer.save(5, noise(5), {}, best=3)
  checkpointer.wait()
  assert steps_of(tmp_path) == [3, 5]
  found = reader.read(directory, '3')[0]
  np.testing.assert_array_equal(found['params.w'], noise(3)['params']['w'])
  checkpointer.close()
  happened('step 3 is as it was, and 5 is saved beside it')


@pytest.mark.fault(
  injected='the disk is full at the end of the run',
  promised='status unsaved (exit 4); the old ones are intact',
)
def test_a_disk_that_stays_full(tmp_path, warnings, happened, full_disk):
  fill, empty = full_disk
  trainer = make_trainer(
    tmp_path,
    num_train_steps=9,
    dataset=Wide(),
    callbacks=[At(fill, 5), callbacks.Checkpoints(4)],
  )
  assert trainer.fit() == 'unsaved'
  empty()
  assert 'step 9' in trainer.stop_reason
  assert steps_of(tmp_path) == [4]
  assert reader.read(tmp_path / 'checkpoints', '4')[1]['step'] == 4
  happened(f'unsaved: {trainer.stop_reason[:50]}...; step 4 is intact')


@pytest.mark.slow
@pytest.mark.fault(
  injected='the disk is full once step 4 is saved (the main job)',
  promised='exit 4, told in lines; step 4 is intact; then bitwise the same end',
)
def test_the_main_job_on_a_full_disk(start, tmp_path, finished, happened):
  workdir = tmp_path / 'run'
  # Of a checkpoint, one file is above 38 kB whatever the timing; no log is.
  first = start(workdir, fault='manifest 1 38')
  assert first.end() == 4, first.output[-3000:]
  assert 'Traceback' not in first.output
  told = [x for x in first.output.splitlines() if 'could not be saved' in x]
  assert len(told) >= 3  # Of 8, of 12, and of 12 again.
  assert 'unsaved at step 12/12: step 12: ' in first.output
  assert steps_of(workdir) == [4]
  assert result_of(workdir)['status'] == 'unsaved'
  second = start(workdir, new=False)
  assert second.end() == 0, second.output[-3000:]
  same_end(workdir, finished[0])
  happened(f'exit 4 after {len(told)} lines; resumed from 4, equal')


FULL = """
import pathlib, sys, time
sys.path.insert(0, 'tests')
import jax.numpy as jnp, numpy as np
from trainers.checkpoint import Checkpointer, SaveError
disk = pathlib.Path(sys.argv[1])
values = np.frombuffer(np.random.default_rng(0).bytes(800_000), np.int32)
checkpointer = Checkpointer(disk / 'checkpoints', 1)
checkpointer.save(1, {'x': jnp.asarray(values)}, {}, None)
checkpointer.wait()
filler = disk / 'filler'
with filler.open('wb', buffering=0) as f:
  try:
    while True:
      f.write(bytes(4096))
  except OSError as error:
    print(error.errno)
try:
  checkpointer.save(2, {'x': jnp.asarray(values)}, {}, None)
  checkpointer.wait()
except SaveError as error:
  print('SaveError', error)
print(sorted(p.name for p in (disk / 'checkpoints').iterdir()))
time.sleep(1)  # Writers may go on a little after their save has failed.
filler.unlink()
checkpointer.save(3, {'x': jnp.asarray(values)}, {}, None)
checkpointer.wait()
print(sorted(p.name for p in (disk / 'checkpoints').iterdir()))
checkpointer.close()
"""


@pytest.mark.slow
@pytest.mark.fault(
  injected='a file system of 3 MB, full (ENOSPC)',
  promised='the old checkpoint is intact; then it saves, and no other is left',
)
def test_a_file_system_that_is_full(tmp_path, happened):
  mount = 'mount -t tmpfs -o size=3m none "$1" && exec "$2" -c "$3" "$1"'
  words = ['unshare', '-rm', 'sh', '-c', mount, 'sh', tmp_path]
  done = subprocess.run(
    [*words, sys.executable, FULL],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=100,
  )
  if 'unshare' in done.stderr or 'mount:' in done.stderr:
    pytest.skip('no file system can be made here')
  assert done.returncode == 0, done.stderr[-3000:]
  full, error, left, then = done.stdout.splitlines()
  assert int(full) == errno.ENOSPC
  assert 'No space left' in error
  # A writer that has not seen its save fail may leave its directory there.
  assert "'1'" in left and "'2'" not in left
  assert then == "['3']"
  happened(f'{error[:70]}...; 1 is left; then 3 is saved')
