"""Runner of jobs: processes side by side, which any kill may interrupt.

Everything that decides what is left to do is in the directories of the runs.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import IO, TextIO

from nanomoe.run import cli, shares, supervisor
from nanomoe.sweeps import outcomes, stopping, table
from nanomoe.sweeps.jobs import Job
from nanomoe.sweeps.outcomes import Outcome, Point
from trainers.errors import UserError

LOG = 'sweep.log'
_POLL_SECONDS = 0.1
# Between two looks at the evaluations of runs that may stop early.
_LOOK_SECONDS = 0.5
_SIGNALS = {int(number) for number in signal.valid_signals()}
# Signals of a process that has crashed: it would crash again.
_CRASHES = (
  *(signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS),
  *(signal.SIGFPE, signal.SIGILL),
)

# Returns the next job given all jobs so far and their outcomes; None if there
# is none, or none before another job has ended.
Ask = Callable[[Sequence[Job], Sequence[Outcome]], Job | None]
# Receives all jobs and their outcomes after each change.
Record = Callable[[Sequence[Job], Sequence[Outcome]], None]


def run(
  jobs: Sequence[Job],
  out: pathlib.Path,
  *,
  num_parallel: int = 1,
  early_stopping: str = 'none',
  ask: Ask | None = None,
  record: Record = lambda jobs, outcomes: None,
) -> list[Outcome]:
  """Trains the jobs that are not done; returns the outcomes of all.

  A killed call is repeated: it waits for processes that the kill has left, and
  resumes. A failed job is tried again by the next call only.

  Args:
    jobs: Jobs in the order of their starts, with different names.
    out: Directory in which each job has its run directory.
    num_parallel: Number of jobs at a time, which divide the cores and GPUs.
    early_stopping: 'none', or 'median' for the median stopping rule.
    ask: Returns further jobs.
    record: Receives jobs and outcomes at the start and after each change.

  Raises:
    UserError: `out` cannot be written, or another sweep runs there.
    KeyboardInterrupt: A signal came. The running jobs have saved their state.
  """
  with _opened_log(out) as log:
    runner = _Runner(jobs, out, num_parallel, early_stopping, ask, record, log)
    return runner.run()


def collect(
  jobs: Sequence[Job], out: pathlib.Path, early_stopping: str = 'none'
) -> list[Outcome]:
  """Returns the outcomes of jobs, without training; arguments as in `run`.

  A job whose last start has failed has the status and reason of that.
  """
  found = _Runner(jobs, out, early_stopping=early_stopping).outcomes()
  recorded = {
    row['name']: row.get('reason')
    for row in table.read(out).get('jobs', [])
    if row['status'] == 'failed'
  }
  for i, outcome in enumerate(found):
    if outcome.status == 'pending' and outcome.name in recorded:
      reason = str(recorded[outcome.name])
      found[i] = outcome._replace(status='failed', reason=reason)
    elif outcome.status == 'pending':  # SLURM can have started it.
      found[i] = outcomes.failed_before(outcome, out / outcome.name)
  return found


@dataclasses.dataclass
class _Slot:
  """A running job.

  Attributes:
    index: Number of the job.
    share: Number of its share of cores and GPUs.
    process: Process of the job; None for one that an earlier sweep started.
    start: Size of the job's output before this start.
    began: Time of the start, seconds.
    is_stopped: Whether the process was told to end early.
  """

  index: int
  share: int
  process: subprocess.Popen | None = None
  start: int = 0
  began: float = 0.0
  is_stopped: bool = False


class _Runner:
  """Jobs, their processes, and how processes of this call have failed."""

  def __init__(
    self,
    jobs: Sequence[Job],
    out: pathlib.Path,
    num_parallel: int = 1,
    early_stopping: str = 'none',
    ask: Ask | None = None,
    record: Record = lambda jobs, outcomes: None,
    log: TextIO | None = None,
  ):
    self._jobs = list(jobs)
    self._out = out
    self._num_parallel = num_parallel
    self._has_rule = early_stopping == 'median'
    self._ask = ask
    self._record = record
    self._log = log
    self._slots: list[_Slot] = []
    self._queue = list(range(len(self._jobs)))
    # Status and reason of processes of this call that have failed.
    self._failures: dict[int, tuple[str, str]] = {}
    # Status and evaluations of jobs that have ended for good.
    self._ended: dict[int, tuple[str, list[Point]]] = {}
    self._looked = 0.0
    self._sizes: list[int] = []

  def run(self) -> list[Outcome]:
    self._record(self._jobs, self.outcomes())
    try:
      while True:
        self._fill()
        if not self._slots:
          break
        time.sleep(_POLL_SECONDS)
        for slot in list(self._slots):
          self._poll(slot)
        if self._has_rule and time.monotonic() - self._looked > _LOOK_SECONDS:
          self._stop_poor_jobs()
    finally:
      self._end_all()
    found = self.outcomes()
    self._record(self._jobs, found)
    return found

  def outcomes(self) -> list[Outcome]:
    """Returns the outcome of each job so far."""
    states = [self._state(index) for index in range(len(self._jobs))]
    if self._has_rule:
      progress = [
        stopping.Progress(points, status not in outcomes.OPEN)
        for status, _, points in states
      ]
      for index, step in enumerate(stopping.stops(progress)):
        if step is not None:
          points = [p for p in states[index][2] if p.step <= step]
          states[index] = 'stopped', '', points
    return [
      outcomes.make(job, status, points, reason)
      for job, (status, reason, points) in zip(self._jobs, states, strict=True)
    ]

  def _state(self, index: int) -> tuple[str, str, list[Point]]:
    """Returns status, reason and evaluations of a job, without the rule."""
    workdir = self._workdir(index)
    is_running = any(slot.index == index for slot in self._slots)
    try:
      if index in self._ended:
        status, points = self._ended[index]
      else:
        points = outcomes.curve(workdir, is_running)
        status = '' if is_running else self._jobs[index].status(workdir)
        if status:
          self._ended[index] = status, points
    except UserError as error:
      return 'failed', outcomes.within(self._out, error.problems[0]), []
    if status:
      return status, outcomes.stop_reason(workdir, status), points
    if is_running:
      return 'running', '', points
    return *self._failures.get(index, ('pending', '')), points

  def _workdir(self, index: int) -> pathlib.Path:
    return self._out / self._jobs[index].name

  def _fill(self) -> None:
    """Starts jobs in the free slots."""
    while len(self._slots) < self._num_parallel:
      if self._queue:
        self._start(self._queue.pop(0))
        continue
      asked = self._ask and self._ask(self._jobs, self.outcomes())
      if not asked:
        break
      self._queue.append(len(self._jobs))
      self._jobs.append(asked)
      self._record(self._jobs, self.outcomes())

  def _start(self, index: int) -> None:
    """Starts a job unless it has ended, or adopts its process."""
    job, workdir = self._jobs[index], self._workdir(index)
    used = {slot.share for slot in self._slots}
    share = min(set(range(self._num_parallel)) - used)
    if outcomes.is_running(workdir):
      self._say(index, 'waiting for its process of an earlier start')
      self._slots.append(_Slot(index, share))
      return
    if self._state(index)[0] not in outcomes.OPEN:
      return
    if self._has_rule and self.outcomes()[index].status == 'stopped':
      return
    is_new = not (workdir / 'config.json').exists()
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      with (workdir / outcomes.OUTPUT).open('ab') as output:
        # The process inherits the lock and holds it as long as it lives.
        with contextlib.suppress(OSError):  # There may be no locks.
          fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        slot = _Slot(index, share, None, output.tell(), time.monotonic())
        slot.process = self._spawn(job.words(workdir), share, output)
    except OSError as error:
      reason = f'it cannot be started ({error.strerror})'
      if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise UserError(f'--out={self._out}: {job.name}: {reason}') from error
      self._failures[index] = 'failed', reason
      self._say(index, f'failed: {reason}')
      return
    self._slots.append(slot)
    self._say(index, 'started' if is_new else 'resumed')
    self._record(self._jobs, self.outcomes())

  def _spawn(
    self, words: Sequence[str], share: int, output: IO[bytes]
  ) -> subprocess.Popen:
    """Starts the process of a job on its share of the machine."""
    cores: Sequence[int] = ()
    environ = dict(os.environ)
    if self._num_parallel > 1:
      cores = shares.share(shares.cores(), share, self._num_parallel)
      all_gpus = shares.gpus(environ)
      gpus = shares.share(all_gpus, share, self._num_parallel)
      if all_gpus and not gpus:
        gpus = [all_gpus[share % len(all_gpus)]]
        # Jobs that share a GPU take memory as they need it.
        environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
      if gpus:
        given = environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
        names = [name for name in given if name]
        environ['CUDA_VISIBLE_DEVICES'] = ','.join(
          names[gpu] if names else str(gpu) for gpu in gpus
        )
    command = supervisor.Command(words, cores=cores)
    return subprocess.Popen(
      # A job whose sweep was killed saves its state and ends.
      supervisor.bound_words(command, signal.SIGTERM),
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=output,
      env=environ,
      # Ctrl-C of a terminal reaches the sweep alone: a second signal would end
      # a job before it has saved.
      start_new_session=True,
    )

  def _poll(self, slot: _Slot) -> None:
    """Handles the end of a job."""
    if slot.process is None:
      if not outcomes.is_running(self._workdir(slot.index)):
        self._slots.remove(slot)
        self._queue.insert(0, slot.index)
      return
    code = slot.process.poll()
    if code is None:
      return
    self._slots.remove(slot)
    failure = self._failure(slot, code)
    if failure and not slot.is_stopped:
      self._failures[slot.index] = failure
    found = self.outcomes()
    self._say(slot.index, _ending(found[slot.index], slot))
    self._record(self._jobs, found)

  def _failure(self, slot: _Slot, code: int) -> tuple[str, str] | None:
    """Returns status and reason of a process that has failed, or None."""
    number = -code if code < 0 else code - 128
    workdir = self._workdir(slot.index)
    if code == cli.INTERRUPTED:
      return 'interrupted', 'interrupted by a signal'
    if number in _SIGNALS:
      by = signal.Signals(number).name
      if number not in _CRASHES:
        return 'killed', f'killed by {by}'
      printed = outcomes.reason_of(workdir, slot.start, '')
      return 'failed', ': '.join(filter(None, [f'crashed by {by}', printed]))
    if self._jobs[slot.index].status(workdir):
      return None
    if code == 0:
      config = self._jobs[slot.index].config
      return 'failed', f'{config} has changed since the jobs were checked'
    text = f'exit code {code}'
    return 'failed', outcomes.reason_of(workdir, slot.start, text)

  def _stop_poor_jobs(self) -> None:
    """Ends running jobs that the median rule stops."""
    self._looked = time.monotonic()
    sizes = [outcomes.size(self._workdir(slot.index)) for slot in self._slots]
    if sizes == self._sizes:  # Nothing new was recorded.
      return
    self._sizes = sizes
    found = self.outcomes()
    for slot in self._slots:
      is_poor = found[slot.index].status == 'stopped'
      if is_poor and slot.process and not slot.is_stopped:
        slot.process.terminate()  # It saves its state.
        slot.is_stopped = True

  def _end_all(self) -> None:
    """Ends the running jobs, which save their states."""
    for slot in self._slots:
      if slot.process:
        slot.process.terminate()
    slots = [slot for slot in self._slots if slot.process]
    codes = [slot.process.wait() for slot in slots if slot.process]
    self._slots.clear()
    for slot, code in zip(slots, codes, strict=True):
      saved = code in (0, cli.INTERRUPTED)
      self._say(
        slot.index,
        'interrupted; its state is saved' if saved else f'ended with {code}',
      )

  def _say(self, index: int, text: str) -> None:
    """Prints a line on standard error, and adds it to the log of the sweep."""
    now = datetime.datetime.now().isoformat(' ', 'seconds')
    total = '' if self._ask else f'/{len(self._jobs)}'
    line = f'{now} [{index + 1}{total}] {self._jobs[index].name}: {text}'
    print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # The disk may be full.
      print(line, file=self._log, flush=True)


def _ending(outcome: Outcome, slot: _Slot) -> str:
  """Returns a few words on the end of a job."""
  text = outcome.status
  if outcome.reason:
    text += f' ({outcome.reason})'
  if outcome.val_loss is not None:
    text += f', val loss {outcome.val_loss:.4f} at step {outcome.step}'
  return f'{text}, after {time.monotonic() - slot.began:.0f} s'


@contextlib.contextmanager
def _opened_log(out: pathlib.Path) -> Iterator[TextIO]:
  """Makes the directory of a sweep; yields its log, which is locked.

  Raises:
    UserError: The directory cannot be written, or another sweep runs there.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    log = (out / LOG).open('a', encoding='utf-8', errors='backslashreplace')
  except OSError as error:
    raise UserError(
      f'--out={out}: the directory cannot be written ({error.strerror})'
    ) from error
  with log:
    try:
      fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'--out={out}: another sweep runs in this directory; wait for it, or '
        'choose another directory'
      ) from error
    except OSError:  # A file system without locks.
      pass
    yield log
