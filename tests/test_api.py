"""nanomoe.train, nanomoe.load and nanomoe.Run, as a notebook calls them."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from configs import base
import nanomoe
from nanomoe import evaluate, experiment, generate, session
from nanomoe.inspection import trace as trace_lib
from nanomoe.run import history
from nanomoe.run import workdir as workdir_lib
from tests import runs
from tests.shrunk import ROOT, TINY
from trainers.callbacks import Callback
from trainers.callbacks.notebook_progress import NotebookProgress
from trainers.errors import UserError


class Interrupting(Callback):
  """Sends SIGINT to this process at one step."""

  def __init__(self, step: int):
    self.step = step

  def on_train_step_end(self, loop):
    if loop.step == self.step:
      os.kill(os.getpid(), signal.SIGINT)


def _state_of_process():
  loggers = [logging.getLogger(n) for n in ('nanomoe', 'trainers', 'absl', '')]
  return (
    dict(os.environ),
    [signal.getsignal(n) for n in sorted(signal.valid_signals())],
    [(x.level, x.propagate, list(x.handlers), x.filters) for x in loggers],
    logging.raiseExceptions,
    sys.stdout,
    sys.stderr,
  )


@pytest.fixture(scope='module')
def changes(corpus):
  return {**TINY, 'data.path': str(corpus), 'precision': 'float32'}


@pytest.fixture(scope='module')
def run(changes, tmp_path_factory):
  """A run that was trained inside a running event loop."""
  workdir = tmp_path_factory.mktemp('api') / 'run'

  async def main():
    found = nanomoe.train(changes, workdir, progress=False)
    assert asyncio.get_running_loop().is_running()
    found.params  # noqa: B018 (It reads the checkpoint.)
    await asyncio.sleep(0)
    return found

  before = _state_of_process()
  found = asyncio.run(main())
  assert _state_of_process() == before
  return found


def test_importing_changes_nothing():
  """In a process of its own: neither the process nor its environment."""
  code = """
import logging, os, signal, sys, threading

def state():
  return (
    dict(os.environ), list(sys.path), sys.excepthook, sys.unraisablehook,
    sys.stdout, sys.stderr, os.getcwd(), logging.getLoggerClass(),
    [signal.getsignal(n) for n in signal.valid_signals()],
    [(x.handlers, x.level) for x in (logging.root, logging.getLogger('absl'))],
    threading.enumerate(),
  )

before = state()
import nanomoe
light = {'numpy', 'jax', 'absl', 'ml_collections'} & set(sys.modules)
assert not light, light
assert {'train', 'load', 'Run'} <= set(dir(nanomoe))
nanomoe.train, nanomoe.load, nanomoe.Run
assert state() == before
assert 'jax' not in sys.modules
"""
  process = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert not process.returncode, process.stderr


def test_the_run_is_done_and_says_so(run):
  assert run.status == run.result['status'] == 'done'
  assert run.step == run.result['best_step']
  assert run.config.model.d_model == TINY['model.d_model']
  text = repr(run)
  assert 'done' in text
  assert '12/12' in text


@pytest.fixture
def configs(monkeypatch):
  """The configs of runs that are begun and not trained."""
  begun = []

  def fit(config, workdir, *_, **__):
    begun.append(config.to_dict())
    workdir.mkdir(parents=True)
    workdir_lib.write_json(workdir / 'config.json', begun[-1])

  monkeypatch.setattr(session, 'fit', fit)
  return begun


def test_a_config_has_three_forms(changes, configs, tmp_path):
  """Each trains with the same config."""
  nested: dict = {}
  for key, value in changes.items():
    section, _, name = key.rpartition('.')
    values = nested.setdefault(section, {}) if section else nested
    values[name] = value
  for i, (config, overrides) in enumerate(
    [
      (changes, None),
      (nested, None),
      (base.get_config(), changes),
      ('configs/base.py', changes),
      (ROOT / 'configs' / 'base.py', nested),
      ({**changes, 'seed': 3}, {'seed': 0}),
    ]
  ):
    nanomoe.train(config, tmp_path / str(i), overrides=overrides)
  assert configs[0]['model']['d_model'] == TINY['model.d_model']
  assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (np.float32(0.5), 0.5),
    (np.int64(2), 2),
    ('5', '5'),
    ([1, 2], [1, 2]),
    (None, None),
    (True, True),
  ],
)
def test_values_keep_their_types(value, expected, configs, tmp_path):
  callback = {'type': 'EarlyStopping', 'argument': value}
  nanomoe.train({'callbacks': {'mine': callback}}, tmp_path / 'run')
  found = configs[0]['callbacks']['mine']['argument']
  assert found == expected
  assert type(found) is type(expected)


def test_metrics_are_the_recorded_ones(run):
  metrics = run.metrics()
  found = history.read(run.workdir)
  assert list(metrics) == found.names()
  steps, loss = metrics['val/cross_entropy']
  assert steps.tolist() == [4, 8, 12]
  recorded = {
    r['step']: r['val/cross_entropy']
    for r in runs.lines_of(run.workdir)
    if 'val/cross_entropy' in r
  }
  np.testing.assert_array_equal(loss, list(recorded.values()))
  assert metrics['val/expert_load'].values.shape[0] == 3


@pytest.mark.slow
def test_the_loss_of_a_text_is_that_of_the_command(run, tmp_path, corpus):
  text = corpus.read_text()[:300]
  path = tmp_path / 'text.txt'
  path.write_text(text)
  expected = evaluate.evaluate(run.workdir, 'val', 'best', data=str(path))
  assert run.loss(text) == pytest.approx(expected['cross_entropy'], rel=1e-6)


@pytest.mark.slow
def test_the_loss_of_a_short_text_is_that_of_its_logits(run):
  text = 'abcab'
  restored = experiment.restore(run.config, run.workdir, 'best')
  tokens = restored.tokenizer.encode(text)
  trained = restored.params, restored.model_state
  logits, _ = restored.task.logits(trained, jnp.asarray(tokens)[None, :-1])
  log_probs = jax.nn.log_softmax(logits[0])
  expected = -np.mean([log_probs[i, t] for i, t in enumerate(tokens[1:])])
  assert run.loss(text) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_text_is_that_of_the_command(run):
  pieces = generate.generate(run.workdir, ['ab'], num_tokens=9, seed=3)
  assert run.generate('ab', 9, seed=3) == 'ab' + ''.join(p for (p,) in pieces)
  assert len(run.generate('ab', 0)) == 2


def test_the_routing_is_that_of_the_trace(run):
  text = 'abcdefghij' * 3
  restored = experiment.restore(run.config, run.workdir, 'best')
  expected = trace_lib.trace(
    restored.task,
    restored.params,
    restored.model_state,
    np.asarray(restored.tokenizer.encode(text)),
    block_size=run.config.block_size,
  )
  found = run.routing(text)
  for x, y in zip(found, expected, strict=True):
    np.testing.assert_array_equal(x, y)
  assert ''.join(run.tokens(text)) == text
  assert found.experts.shape == (2, len(text), run.config.moe.top_k)


def test_the_parameters_are_those_of_the_step(run):
  result = json.loads((run.workdir / 'result.json').read_text())
  step = 8 if result['best_step'] != 8 else 12
  other = nanomoe.load(run.workdir, step=step)
  assert other.step == step
  for params, restored in (
    (run.params, experiment.restore(run.config, run.workdir, 'best')),
    (other.params, experiment.restore(run.config, run.workdir, str(step))),
  ):
    jax.tree.map(np.testing.assert_array_equal, params, restored.params)
  leaves = zip(
    jax.tree.leaves(run.params), jax.tree.leaves(other.params), strict=True
  )
  assert any((a != b).any() for a, b in leaves)


def _line(call) -> str:
  with pytest.raises(UserError) as error:
    call()
  (line,) = error.value.problems
  assert error.value._render_traceback_() == [f'error: {line}']
  return line


def test_a_mistake_is_a_line_that_names_the_argument(run, tmp_path, changes):
  new = tmp_path / 'new'
  for call, start in (
    (lambda: nanomoe.load(tmp_path), f'workdir={tmp_path}: '),
    (lambda: nanomoe.train({'lr': 1}, new), "unknown config key 'lr'"),
    (lambda: nanomoe.train('absent.py', new), 'config=absent.py: '),
    (lambda: nanomoe.train({'moe.top_k': 9}, new), 'moe.top_k=9: '),
    (lambda: nanomoe.train(changes, ROOT / 'setup.cfg'), 'workdir='),
    (lambda: run.generate('a', -1), 'num_tokens=-1: '),
    (lambda: run.generate(''), "prompt='': "),
    (lambda: run.generate('é'), 'prompt: '),
    (lambda: run.loss('a'), "text='a': "),
    (lambda: run.routing(''), "text='': "),
    (lambda: run.loss('a\ud800'), "text='a\\ud800': it is not UTF-8"),
    (lambda: run.routing('\ud800'), "text='\\ud800': it is not UTF-8"),
    (lambda: run.tokens('\ud800'), "text='\\ud800': it is not UTF-8"),
    (lambda: nanomoe.load(run.workdir, step=7).params, 'step=7: '),
    (lambda: run.resume({'model.d_model': 8}), 'model.d_model was 16'),
  ):
    line = _line(call)
    assert line.startswith(start), line
    assert ' --' not in line
  assert not new.exists()
  assert session._TRAINING.acquire(blocking=False)
  try:
    line = _line(lambda: nanomoe.train(changes, new))
  finally:
    session._TRAINING.release()
  assert line.startswith(f'workdir={new}: another run')


def test_a_changed_config_is_told_how_to_change(run):
  changed = run.config.to_dict()
  changed['optimizer']['learning_rate'] = 1.0
  line = _line(lambda: nanomoe.train(ConfigDict(changed), run.workdir))
  assert line.endswith("give overrides={'optimizer.learning_rate': ...}")


def test_without_pandas_a_frame_is_refused(run, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pandas', None)
  assert 'pandas' in _line(lambda: run.metrics(frame=True))


@pytest.mark.slow
def test_an_interrupt_saves_and_the_run_resumes(run, changes, tmp_path):
  """In the main thread of a process that goes on."""
  workdir = tmp_path / 'run'
  callback = {'type': 'tests.test_api.Interrupting', 'step': 3}
  before = _state_of_process()
  with pytest.raises(KeyboardInterrupt, match='SIGINT: step 3 is saved'):
    nanomoe.train(
      {**changes, 'callbacks.stop': callback}, workdir, progress=False
    )
  assert _state_of_process() == before
  stopped = nanomoe.load(workdir)
  assert stopped.step == 3  # No checkpoint is the best before an evaluation.
  assert len(stopped.generate('a', 5)) == 6
  assert repr(stopped).endswith(': interrupted, step 3/12>')
  assert stopped.status == 'interrupted'
  # Another thread has no signals.
  threading.Thread(target=lambda: stopped.resume(progress=False)).start()
  for thread in threading.enumerate():
    if thread is not threading.main_thread() and not thread.daemon:
      thread.join()
  assert nanomoe.load(workdir).status == 'done'
  assert runs.metrics_of(workdir) == runs.metrics_of(run.workdir)


def test_a_killed_run_can_resume(run, tmp_path):
  for name in ('config.json', 'result.json', 'metrics.jsonl'):
    text = (run.workdir / name).read_text()
    (tmp_path / name).write_text(text.replace('"done"', '"running"'))
  assert nanomoe.load(tmp_path).status == 'interrupted'


class Handle:
  """IPython's handle of a display."""

  def __init__(self, bundles):
    self.bundles = bundles

  def update(self, bundle, raw):
    assert raw
    self.bundles.append(bundle)


def test_progress_replaces_itself(monkeypatch):
  bundles = []

  def display(bundle, raw, display_id):
    assert raw
    assert display_id
    bundles.append(bundle)
    return Handle(bundles)

  loop = types.SimpleNamespace(
    status='running',
    step=0,
    num_train_steps=12,
    best=None,
    clock=types.SimpleNamespace(current='train'),
  )
  monkeypatch.setattr('trainers.callbacks.notebook_progress.SECONDS', 0)
  progress = NotebookProgress(display)
  progress.on_fit_start(loop)
  loop.step = 6
  progress.on_log(loop, {'train/loss': 2.5, 'steps_per_sec': 3.0})
  progress.on_train_step_end(loop)
  loop.step, loop.status = 12, 'done'
  progress.on_fit_end(loop)
  lines = [bundle['text/plain'] for bundle in bundles]
  assert lines == [
    '0/12',
    '6/12  loss 2.5000  3.00 steps/s',
    '12/12  loss 2.5000  3.00 steps/s  done',
  ]
  assert 'value="12" max="12"' in bundles[-1]['text/html']
  assert json.dumps(bundles)
