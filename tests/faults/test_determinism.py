"""The same command gives the same numbers; nothing leaks."""

import functools
import json
import subprocess
import sys

import pytest
from regression import Regression, Rows, bits, host, make_trainer

from tests.runs import metrics_of
from tests.shrunk import ROOT
from trainers import callbacks, trainer
from trainers.runtime.prefetch import prefetched


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.fault(
  injected='the same command twice',
  promised='metrics.jsonl bitwise the same, but for what a clock says',
)
def test_the_same_command_twice(start, tmp_path, finished, happened):
  def lines(workdir):
    text = (workdir / 'metrics.jsonl').read_text()
    return [
      json.dumps({k: v for k, v in json.loads(x).items() if 'sec' not in k})
      for x in text.splitlines()
    ]

  workdir = tmp_path / 'run'
  process = start(workdir)
  assert process.end() == 0, process.output[-2000:]
  assert lines(workdir) == lines(finished[0])
  text = (workdir / 'sample.txt').read_text()
  assert text == (finished[0] / 'sample.txt').read_text()
  happened(f'{len(lines(workdir))} lines, equal')


@pytest.mark.slow
@pytest.mark.fault(
  injected='prefetch depth 0, 1, 2 and 7',
  promised='changes nothing, bitwise',
)
def test_prefetch_depth_changes_nothing(tmp_path, monkeypatch, happened):
  found = []
  for depth in (0, 1, 2, 7):
    monkeypatch.setattr(
      trainer, 'prefetched', functools.partial(prefetched, depth=depth)
    )
    workdir = tmp_path / str(depth)
    workdir.mkdir()
    run = make_trainer(
      workdir,
      task=Regression(noise=0.1),
      dataset=Rows({2: float('nan')}),
      callbacks=[callbacks.Evaluation(4, 'mse'), callbacks.Checkpoints(4)],
    )
    assert run.fit() == 'done'
    found.append((bits(host(run.state)), metrics_of(workdir)))
  assert all(one == found[0] for one in found)
  happened('four runs, equal')


LEAKS = """
import gc, json, os, pathlib, sys, threading
sys.path.insert(0, 'tests')
from regression import Rows, make_trainer
from trainers import callbacks

workdir, num_steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
rows = []

class Measure(callbacks.Callback):
  def on_train_step_end(self, loop):
    if loop.step % (num_steps // 10) == 0:
      gc.collect()
      pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
      rows.append({
        'step': loop.step,
        'memory': pages * os.sysconf('SC_PAGE_SIZE'),
        'threads': len(os.listdir('/proc/self/task')),
        'files': len(os.listdir('/proc/self/fd')),
        'python_threads': threading.active_count(),
      })

trainer = make_trainer(
  workdir,
  num_train_steps=num_steps,
  log_interval=20,
  callbacks=[
    callbacks.Progress(24),
    callbacks.Evaluation(50, 'mse'),
    callbacks.RefusedUpdates(3),
    callbacks.Checkpoints(50),
    Measure(),
    callbacks.Result({}, 24, 'mse', {}),
  ],
)
assert trainer.fit() == 'done'
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.fault(
  injected='10,000 steps, with 200 evaluations and 200 checkpoints',
  promised='memory, threads and file descriptors stay flat',
)
def test_nothing_leaks(tmp_path, happened):
  done = subprocess.run(
    [sys.executable, '-c', LEAKS, tmp_path, '10000'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  rows = json.loads(done.stdout.splitlines()[-1])
  for row in rows:
    print(row)
  # A save may be going on, with threads and files of its own.
  for name, slack in (('threads', 6), ('python_threads', 4), ('files', 12)):
    values = [row[name] for row in rows[1:]]
    assert max(values) - min(values) <= slack, (name, values)
    assert values[-1] <= values[0] + slack / 2, (name, values)
  memory = [row['memory'] / 1e6 for row in rows]
  # Between the second tenth and the last: MB.
  growth = memory[-1] - memory[1]
  assert growth < 25, memory
  last = rows[-1]
  happened(
    f'from step 2,000 to 10,000: {growth:+.0f} MB of {memory[1]:.0f}; '
    f'{last["threads"]} threads, {last["files"]} files'
  )
