"""Several processes of one run on this machine, with a fault in one of them."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest

from benchmarks.process_group import free_port
from tests.faults.inject import NOTE
from tests.runs import metrics_of, result_of
from tests.shrunk import ROOT
from trainers.checkpoint import reader

# A run of seconds: processes are tested, not the model.
SMALL = {
  'num_train_steps': 8,
  'batch_size': 4,
  'block_size': 16,
  'eval_interval': 4,
  'eval_iters': 2,
  'log_interval': 2,
  # Arrays above 1 kB: Orbax writes smaller ones to files that all read.
  'model.d_model': 16,
  'model.num_layers': 1,
  'model.num_heads': 1,
  'model.dropout_rate': 0.0,
  'moe.first_dense_layers': 1,
  'moe.dense_d_ff': 128,
  'sample.num_tokens': 0,
}
LAST = SMALL['num_train_steps']
# Variable that marks the processes of this session, and of no other.
_MARK = 'NANOMOE_TEST_PROCESSES'
SESSION = uuid.uuid4().hex


def case(what, *arguments, often=False):
  """A row of the table; without `often`, CI leaves it to the benchmark."""
  marks = [pytest.mark.fault(injected=what)]
  marks += [] if often else [pytest.mark.full]
  return pytest.param(*arguments, marks=marks)


def alive() -> list[int]:
  """The processes of this session that live, zombies not counted."""
  mark = f'{_MARK}={SESSION}'.encode()
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):  # It has ended meanwhile.
      if mark in (path / 'environ').read_bytes().split(b'\0'):
        found.append(int(path.name))
  return found


@dataclasses.dataclass
class Gone:
  """All processes of a run have ended.

  Attributes:
    codes: Exit codes by process; minus the signal that ended it.
    seconds: Seconds from the fault until the last process was gone.
  """

  codes: list[int]
  seconds: float

  def __str__(self) -> str:
    if len(set(self.codes)) == 1:
      return f'exit {self.codes[0]}'
    return 'exit ' + ', '.join(map(str, self.codes))


class Job:
  """Processes of one run, which make up one process group.

  Args:
    folder: Directory of their outputs.
    workdir: Value of --workdir.
    size: Number of processes.
    text: Path of the text.
    mesh: Sizes of the axes of the mesh.
    changes: Config keys that differ from `SMALL`.
    words: Further words of all processes.
    port: Port of the coordinator; 0 chooses one.
  """

  def __init__(
    self,
    folder,
    workdir,
    *,
    size,
    text,
    mesh=None,
    changes=None,
    words=(),
    port=0,
  ):
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self.workdir, self.size = folder, workdir, size
    self.port = port or free_port()
    mesh = mesh or {'data': size}
    mesh = {f'mesh.{axis}': number for axis, number in mesh.items()}
    values = {**SMALL, **mesh, 'data.path': text, **(changes or {})}
    self.words = [
      f'--config={ROOT}/configs/base.py',
      *(f'--config.{key}={value}' for key, value in values.items()),
      f'--workdir={workdir}',
      f'--coordinator=127.0.0.1:{self.port}',
      f'--num_processes={size}',
      *words,
    ]
    self.processes: dict[int, subprocess.Popen] = {}
    self._group = 0
    self._started = time.monotonic()

  def start(
    self, i, *words, fault='', name=None, prefix=(), cwd=ROOT, env=None
  ) -> 'Job':
    """Starts process `i`.

    Args:
      i: Value of --process_id.
      *words: Words of this process alone; they win.
      fault: First arguments of tests/faults/inject.py.
      name: Name of the process among the others, if it is not `i`.
      prefix: Words before the command.
      cwd: Directory in which it starts.
      env: Environment variables of this process alone.
    """
    name = i if name is None else name
    module = ['tests.faults.inject', *fault.split()]
    module = module if fault else ['nanomoe.main']
    own = [*self.words, f'--process_id={i}', *words]
    with self._output(name).open('w') as file:
      self.processes[name] = subprocess.Popen(
        [*prefix, sys.executable, '-m', *module, *own],
        cwd=cwd,
        stdout=file,
        stderr=subprocess.STDOUT,
        process_group=self._group,
        env={
          **os.environ,
          # With it, a process need not start itself again.
          'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
          'PYTHONPATH': str(ROOT),
          # Programs of a resumed run are all compiled before.
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          _MARK: SESSION,
          NOTE: str(self.note(name)),
          **(env or {}),
        },
      )
    self._group = self._group or self.processes[name].pid
    self._started = time.monotonic()
    return self

  def start_all(self, *, fault='', at=0) -> 'Job':
    """Starts all processes, one of them with a fault."""
    for i in range(self.size):
      self.start(i, fault=fault if i == at else '')
    return self

  def num_connections(self) -> int:
    """The processes that are connected to the coordinator, itself included."""
    rows = pathlib.Path('/proc/net/tcp').read_text().splitlines()[1:]
    found = [row.split()[2:4] for row in rows]  # Remote address, and state.
    return found.count([f'0100007F:{self.port:04X}', '01'])

  def proceed(self, name) -> None:
    """Ends the wait of a process with the fault 'wait'."""
    self.note(name).with_name(f'fault.{name}.continue').touch()

  def _output(self, name) -> pathlib.Path:
    return self.folder / f'output.{name}.txt'

  def note(self, name) -> pathlib.Path:
    return self.folder / f'fault.{name}'

  def output(self, name=0) -> str:
    return self._output(name).read_text()

  def outputs(self) -> str:
    return '\n'.join(f'[{i}] {self.output(i)[-2500:]}' for i in self.processes)

  def until(self, condition, seconds=100) -> None:
    """Waits; fails if a process ends before."""
    end = time.monotonic() + seconds
    while not condition():
      codes = [process.poll() for process in self.processes.values()]
      assert not any(code is not None for code in codes), self.outputs()
      assert time.monotonic() < end, self.outputs()
      time.sleep(0.02)

  def gone(self, seconds=90, *, but=()) -> Gone:
    """Waits until all processes are gone, but those that are stopped.

    They are killed after the others have left.
    """
    waiting = {n: p for n, p in self.processes.items() if n not in but}
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in waiting.values()):
      if time.monotonic() > end:
        left = [n for n, p in waiting.items() if p.poll() is None]
        text = self.outputs()
        self.kill()
        raise AssertionError(f'{left} hang: {text}')
      time.sleep(0.02)
    last = time.monotonic()
    self.kill()
    codes = [process.wait() for process in self.processes.values()]
    notes = [p for name in self.processes if (p := self.note(name)).exists()]
    since = [float(path.read_text()) for path in notes] or [self._started]
    return Gone(codes, last - min(since))

  def kill(self) -> None:
    """Ends all that is left of the group."""
    if self._group:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._group, signal.SIGKILL)
    for process in self.processes.values():
      process.wait()


def ends_like(job: Job, launch, workdir, wanted) -> None:
  """The same command again: it ends where the undisturbed run did."""
  again = launch(workdir, port=job.port)
  again.words = job.words
  gone = again.start_all().gone()
  assert gone.codes == [0, 0], again.outputs()
  assert 'Traceback' not in again.outputs()
  same_end(workdir, wanted)


def steps_of(workdir: pathlib.Path) -> list[int]:
  """The checkpoints that are there."""
  return reader.steps_in(workdir / 'checkpoints')


def same_end(workdir: pathlib.Path, wanted: pathlib.Path) -> None:
  """Compares the last state bitwise, the metrics and the result."""
  (found, meta), (expected, expected_meta) = (
    reader.read(path / 'checkpoints', str(LAST)) for path in (workdir, wanted)
  )
  assert meta['content'] == expected_meta['content']
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  assert metrics_of(workdir) == metrics_of(wanted)
  results = [result_of(path) for path in (workdir, wanted)]
  for key in ('status', 'step', 'val_loss', 'best_step', 'skipped_updates'):
    assert results[0][key] == results[1][key], key
