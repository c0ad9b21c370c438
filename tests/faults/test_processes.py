"""Processes of one run: however one of them ends, all end, and none is lost."""

import signal
import time

import pytest

from tests.processes import LAST, alive, case, ends_like, same_end, steps_of
from tests.runs import result_of

pytestmark = pytest.mark.slow

# The heartbeat of JAX takes 10 s.
SECONDS = 15
SHORT = '--hang_timeout=8'
TO = {'0': 'process 0', '1': 'process 1', 'all': 'all'}
IN = {
  'step': ('step 5', 'in a step'),
  'evaluation': ('evaluation 2', 'in an evaluation'),
  'save': ('save 1', 'in a save'),
  'start': ('start 1', 'while the run is being built'),
  'end': ('end 1', 'when all is done, before the files are closed'),
  'parting': ('parting 1', 'when the files are closed'),
  'copy': ('copy 2', 'while it copies the arrays of a save'),
  'manifest': ('manifest 1', 'between a commit and its manifest'),
}


def sent(name, to, place, often=False):
  """A case of a signal: its fault, and the process that comes to the place."""
  where, text = IN[place]
  what = f'all:{name}' if to == 'all' else name
  process = 1 if to == 'all' else int(to)
  injected = f'SIG{name.replace(",", ", SIG")} to {TO[to]} {text}'
  return case(injected, f'{where} {what}', process, often=often)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    sent('TERM', '0', 'step'),
    sent('TERM', '0', 'evaluation'),
    sent('TERM', '0', 'save'),
    sent('TERM', '1', 'step', often=True),
    sent('TERM', '1', 'evaluation'),
    sent('TERM', '1', 'save'),
    sent('TERM', 'all', 'step'),
    sent('TERM', 'all', 'evaluation'),
    sent('TERM', 'all', 'save'),
    sent('INT', '0', 'step'),
    sent('INT', '1', 'evaluation'),
    sent('INT', 'all', 'save'),
    sent('HUP', '0', 'save'),
    sent('HUP', '1', 'step'),
    sent('HUP', 'all', 'evaluation'),
    sent('USR1', '0', 'evaluation'),
    sent('USR1', '1', 'save'),
    sent('USR1', 'all', 'step'),
  ],
)
@pytest.mark.fault(
  promised='all stop after one step, exit 75; resumed, bitwise the same'
)
def test_interrupted(launch, tmp_path, undisturbed, happened, fault, at):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone()
  assert gone.codes == [75, 75], job.outputs()
  assert gone.seconds < SECONDS
  assert 'Traceback' not in job.outputs()
  result = result_of(workdir)
  step = result['step']
  assert result['status'] == 'interrupted'
  name = fault.split()[-1].removeprefix('all:')
  assert result['stop_reason'] == f'SIG{name}'
  assert steps_of(workdir)[-1] == step <= LAST
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}, step {step} saved; equal', gone.seconds)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    sent('TERM', '0', 'start'),
    sent('TERM', '1', 'start', often=True),
    sent('INT', 'all', 'start'),
    sent('HUP', '1', 'start'),
    sent('USR1', '0', 'start'),
  ],
)
@pytest.mark.fault(promised='exit 75, no workdir; started again, bitwise equal')
def test_interrupted_while_starting(
  launch, tmp_path, undisturbed, happened, fault, at
):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone()
  assert gone.codes == [75, 75], job.outputs()
  assert gone.seconds < SECONDS
  assert 'Traceback' not in job.outputs()
  assert not workdir.exists()
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}, no workdir; equal', gone.seconds)


@pytest.mark.parametrize(
  'target',
  [
    case('SIGTERM to process 0, while two processes wait for a third', 0),
    case('SIGTERM to process 1, while two processes wait for a third', 1),
  ],
)
@pytest.mark.fault(promised='both exit with 75, and the workdir is not made')
def test_interrupted_while_waiting(launch, tmp_path, happened, target):
  workdir = tmp_path / 'run'
  job = launch(workdir, size=3).start(0).start(1)
  job.until(lambda: job.num_connections() == 2)
  job.note(target).write_text(str(time.monotonic()))
  job.processes[target].send_signal(signal.SIGTERM)
  gone = job.gone()
  assert gone.codes == [75, 75], job.outputs()
  assert gone.seconds < SECONDS
  assert 'Traceback' not in job.outputs()
  assert not workdir.exists()
  happened(f'{gone}, no workdir', gone.seconds)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    sent('TERM', '0', 'end'),
    sent('TERM', '1', 'end'),
    sent('INT', 'all', 'end'),
    sent('HUP', '0', 'end'),
    sent('USR1', '1', 'end'),
  ],
)
@pytest.mark.fault(promised='exit 0: there is nothing to resume')
def test_interrupted_at_the_end(
  launch, tmp_path, undisturbed, happened, fault, at
):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone()
  assert gone.codes == [0, 0], job.outputs()
  assert gone.seconds < SECONDS
  assert 'Traceback' not in job.outputs()
  same_end(workdir, undisturbed())
  happened(f'{gone}; equal', gone.seconds)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    sent('TERM,TERM', '0', 'step'),
    sent('TERM,TERM', '1', 'step', often=True),
    sent('INT,INT', '1', 'save'),
    sent('TERM,INT', '0', 'evaluation'),
  ],
)
@pytest.mark.fault(
  promised='it leaves at once, the others within 15 s; resumed, bitwise equal'
)
def test_interrupted_twice(launch, tmp_path, undisturbed, happened, fault, at):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone()
  last = fault.rpartition(',')[2]
  assert gone.codes[at] == 128 + signal.Signals[f'SIG{last}'], job.outputs()
  assert gone.codes[1 - at] != 0, job.outputs()
  assert gone.seconds < SECONDS
  left = steps_of(workdir)
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}, checkpoints {left} were left; equal', gone.seconds)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    sent('KILL', '0', 'step', often=True),
    sent('KILL', '0', 'evaluation'),
    sent('KILL', '0', 'save'),
    sent('KILL', '0', 'manifest'),
    sent('KILL', '0', 'start'),
    sent('KILL', '0', 'end'),
    sent('KILL', '1', 'step'),
    sent('KILL', '1', 'evaluation'),
    sent('KILL', '1', 'save', often=True),
    sent('KILL', '1', 'copy'),
    sent('KILL', '1', 'start'),
    sent('KILL', '1', 'end'),
    sent('KILL', '1', 'parting'),
  ],
)
@pytest.mark.fault(
  promised='the others exit within 15 s; resumed, bitwise the same'
)
def test_killed(launch, tmp_path, undisturbed, happened, fault, at):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone()
  assert gone.codes[at] == -signal.SIGKILL, job.outputs()
  is_saved = fault.startswith(('end', 'parting'))
  assert is_saved or gone.codes[1 - at] != 0, job.outputs()
  assert gone.seconds < SECONDS
  left = steps_of(workdir) if (workdir / 'checkpoints').exists() else []
  if gone.codes[0] == 1:  # It could still write.
    assert result_of(workdir)['status'] == 'failed'
  assert not is_saved or left[-1] == LAST
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}, checkpoints {left} were left; equal', gone.seconds)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    sent('STOP', '0', 'step'),
    sent('STOP', '1', 'step', often=True),
    sent('STOP', '1', 'save'),
    sent('STOP', '1', 'start'),
  ],
)
@pytest.mark.fault(
  promised='the others exit within 15 s; resumed, bitwise the same'
)
def test_suspended(launch, tmp_path, undisturbed, happened, fault, at):
  workdir = tmp_path / 'run'
  job = launch(workdir).start_all(fault=fault, at=at)
  gone = job.gone(but=[at])
  assert gone.codes[1 - at] != 0, job.outputs()
  assert gone.seconds < SECONDS
  ends_like(job, launch, workdir, undisturbed())
  happened(f'the other process: exit {gone.codes[1 - at]}; equal', gone.seconds)


@pytest.mark.parametrize(
  ('fault', 'at'),
  [
    case('process 0 sleeps for ever in a step', 'step 5 hang', 0),
    case('process 1 sleeps for ever in a step', 'step 5 hang', 1),
    case('process 1 sleeps for ever in a save', 'copy 1 hang', 1),
  ],
)
@pytest.mark.fault(
  promised=f'all exit after {SHORT}; resumed, bitwise the same'
)
def test_hung(launch, tmp_path, undisturbed, happened, fault, at):
  workdir = tmp_path / 'run'
  job = launch(workdir, words=[SHORT]).start_all(fault=fault, at=at)
  gone = job.gone()
  assert all(gone.codes), job.outputs()
  assert gone.seconds < 8 + SECONDS
  ends_like(job, launch, workdir, undisturbed())
  happened(f'{gone}; equal', gone.seconds)


@pytest.mark.parametrize(
  'at',
  [
    case('a plug-in callback raises on process 0 alone', 0),
    case('a plug-in callback raises on process 1 alone', 1, often=True),
  ],
)
@pytest.mark.fault(promised='exit 1 everywhere; the others name the process')
def test_a_callback_raises(launch, tmp_path, undisturbed, happened, at):
  workdir = tmp_path / 'run'
  words = [
    '--config.callbacks.raises.type=tests.raising.Raises',
    f'--config.callbacks.raises.process={at}',
    '--config.callbacks.raises.step=6',
  ]
  job = launch(workdir, words=words).start_all()
  gone = job.gone()
  assert gone.codes == [1, 1], job.outputs()
  assert 'ZeroDivisionError' in job.output(at)
  assert 'Traceback' not in job.output(1 - at)
  assert f'process {at}' in job.output(1 - at)
  assert result_of(workdir)['status'] == 'failed'
  left = steps_of(workdir)  # Without 4 if its save had not ended.
  assert left in ([4], [])
  happened(f'{gone}, checkpoints {left} were left', gone.seconds)


@pytest.mark.fault(
  injected='all of the above', promised='no process of a run is left behind'
)
def test_none_is_left(happened):
  assert alive() == []
  happened('none', 0.0)
