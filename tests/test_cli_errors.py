"""A user's mistake: exit code 2, a line each on stderr, no traceback."""

import fcntl
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from configs import base
from nanomoe import experiment
from nanomoe import main as main_lib
from nanomoe.config import overrides as config_lib
from nanomoe.data import corpus as corpus_lib
from trainers.errors import UserError

MAIN = [sys.executable, '-m', 'nanomoe.main']


def mistakes(process: subprocess.CompletedProcess) -> list[str]:
  """What a process told, having checked how."""
  assert 'Traceback' not in process.stderr
  assert process.returncode == 2, process.stderr
  lines = process.stderr.splitlines()
  assert lines
  assert all(line.startswith('error: ') for line in lines), process.stderr
  assert process.stdout == ''  # Nothing was started.
  return lines


def test_many_mistakes_are_a_line_each(run, command, tmp_path):
  lines = mistakes(
    run(
      command(
        '--config.optimizer.learning_rte=0.1',
        '--config.moe.top_k=two',
        '--config.batch_size=-3',
        '--config.optimizer.beta1=nan',
        '--config.model.num_layers',
        '1.5',
        f'--workdir={tmp_path / "run"}',
      )
    )
  )
  assert len(lines) == 5
  for words in [
    ('learning_rte', "'optimizer.learning_rate'"),
    ('moe.top_k', 'two'),
    ('batch_size', '-3'),
    ('optimizer.beta1', 'nan'),
    ('model.num_layers', '1.5'),
  ]:
    assert sum(all(w in line for w in words) for line in lines) == 1, words
  assert not (tmp_path / 'run').exists()


def test_values_that_contradict_each_other(run, command):
  changes = {'moe.top_k': 5, 'model.d_model': 30, 'model.num_heads': 4}
  experts, heads = mistakes(run(command(changes=changes)))
  assert 'moe.top_k=5' in experts
  assert 'moe.num_experts=4' in experts
  assert 'model.d_model=30' in heads
  assert 'model.num_heads=4' in heads


def test_no_config(run, tmp_path):
  (line,) = mistakes(run(MAIN))
  assert '--config' in line
  # A directory without a run is no config either.
  (line,) = mistakes(run([*MAIN, f'--workdir={tmp_path}']))
  assert '--config' in line
  assert str(tmp_path) in line


def test_a_missing_config_file(run):
  (line,) = mistakes(run([*MAIN, '--config=configs/bse.py']))
  assert 'configs/bse.py' in line
  assert 'configs/base.py' in line  # That is there.


@pytest.mark.parametrize('below', [False, True])
def test_a_workdir_that_cannot_be_written(run, command, tmp_path, below):
  path = tmp_path / 'file'
  path.write_text('mine')
  workdir = path / 'run' if below else path
  (line,) = mistakes(run(command(f'--workdir={workdir}')))
  assert '--workdir' in line
  assert str(workdir) in line
  assert path.read_text() == 'mine'


@pytest.mark.parametrize(
  'words, told',
  [
    (['--confg=configs/base.py'], ['confg', 'config']),
    (['--config=configs/base.py', '--config.seed'], ['config.seed']),
    (['--config=configs/base.py', '--workdir'], ['workdir']),
    (['--config=configs/base.py', 'seed=3'], ['seed=3']),
  ],
  ids=lambda words: words[-1],
)
def test_a_flag_that_is_none(run, words, told):
  (line,) = mistakes(run([*MAIN, *words]))
  for word in told:
    assert word in line.removeprefix('error: ')


def test_a_damaged_run(run, tmp_path):
  (tmp_path / 'config.json').write_text('{"seed": ')
  (line,) = mistakes(run([*MAIN, f'--workdir={tmp_path}']))
  assert str(tmp_path / 'config.json') in line


def test_a_mistake_is_told_before_jax_is_imported(run, command):
  words = command('--config.seed=-1')
  # stderr then names all imports.
  process = run([words[0], '-X', 'importtime', *words[1:]])
  assert process.returncode == 2
  imported = {
    line.rpartition('|')[2].strip()
    for line in process.stderr.splitlines()
    if line.startswith('import time:')
  }
  assert 'absl.flags' in imported
  assert not imported & {'jax', 'flax', 'optax', 'orbax', 'clu'}


def test_exit_codes_are_those_of_the_contract(monkeypatch, tmp_path):
  """`main` returns the code of the status that the trainer ends with."""
  codes = {
    'done': 0,
    'diverged': 3,
    'collapsed': 3,
    'unsaved': 4,
    'interrupted': 75,
  }
  assert main_lib.EXIT_CODES.keys() == codes.keys()
  config = config_lib.apply(base.get_config(), [])
  main_lib._parse(['main'])
  monkeypatch.setattr(main_lib, 'requested_config', lambda _: (config, None))
  # The logs of the other tests stay as they are.
  monkeypatch.setattr(main_lib.terminal, 'log_to_terminal', lambda **_: None)
  monkeypatch.setattr(main_lib.workdir_lib, 'log_to', lambda _: None)
  for status, code in codes.items():
    trainer = types.SimpleNamespace(
      fit=lambda status=status: status,
      status=status,
      step=3,
      num_train_steps=9,
      stop_reason='a reason',
      best=None,
      callbacks=[],
    )
    monkeypatch.setattr(experiment, 'build', lambda *_, t=trainer: t)
    monkeypatch.setattr(main_lib, '_workdir', lambda s=status: tmp_path / s)
    assert main_lib.main([]) == code, status


def test_the_status_of_somebody_elses_callback_has_a_code():
  assert main_lib.exit_code('out_of_budget') == 3
  assert main_lib.exit_code('done') == 0


# Data. As a process: tests/faults/test_input.py.


BAD_DATA = {
  'missing': (lambda path: None, 'no such file'),
  'empty': (lambda path: path.touch(), 'empty'),
  'directory': (lambda path: path.mkdir(), 'directory'),
  'binary': (lambda path: path.write_bytes(b'text\x80'), 'byte 4 '),
  'pipe': (os.mkfifo, 'regular'),
  # 90 characters, and 9 of them to evaluate on: less than a window of 17.
  'short': (lambda path: path.write_text('ab\n' * 30), 'block_size=16'),
}


@pytest.mark.parametrize('kind', BAD_DATA)
def test_bad_data(tiny, tmp_path, kind):
  make, told = BAD_DATA[kind]
  path = tmp_path / 'text.txt'
  make(path)
  run = tmp_path / 'run'
  run.mkdir()
  with pytest.raises(UserError) as error:
    experiment.build(tiny({'data.path': path}), run)
  (line,) = error.value.problems
  assert told in line
  assert kind == 'short' or str(path) in line
  assert list(run.iterdir()) == []  # No run was begun.


def test_bad_specs_are_told_by_the_key(tiny, tmp_path):
  for key, told in [
    ('moe.router.type', 'TopK'),
    ('optimizer.schedule.type', 'warmup_cosine'),
    ('callbacks.early_stopping.type', 'EarlyStopping'),
  ]:
    with pytest.raises(UserError) as error:
      experiment.build(tiny({key: f'{told[:-1]}'}), tmp_path)
    (line,) = error.value.problems
    assert key in line
    assert repr(told) in line


def test_an_argument_of_a_callback_of_the_wrong_type(tiny, tmp_path):
  """Not after the first evaluation, when it is compared with a number."""
  changes = {'callbacks.early_stopping.patience': 'never'}
  with pytest.raises(UserError, match=r'callbacks\.early_stopping\.patience'):
    experiment.build(tiny(changes), tmp_path)


def test_a_split_as_long_as_a_window_is_enough(tiny, tmp_path):
  """170 characters: 153 to train, and 17 = block_size + 1 to evaluate on."""
  path = tmp_path / 'text.txt'
  letters = np.array(list('ab\n'))
  path.write_text(''.join(np.resize(letters, 170)))
  config = tiny({'data.path': path, 'eval_iters': 0})
  trainer = experiment.build(config, tmp_path / 'enough')
  (batch,) = trainer.dataset.eval_batches('val', slice(None))
  assert batch['weights'].sum() == 16
  # With one character less, training has too few, and evaluation pads.
  path.write_text(''.join(np.resize(letters, 18)))
  with pytest.raises(UserError) as error:
    experiment.build(tiny({'data.path': path}), tmp_path / 'few')
  assert str(path) in str(error.value)


def test_a_second_process_in_a_workdir_is_refused(tmp_path, run, command):
  """The first holds a lock for as long as it lives, and no longer."""
  with (tmp_path / 'log.txt').open('a') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    process = run(command(f'--workdir={tmp_path}'))
  assert process.returncode == 2
  assert 'another process' in process.stderr
  assert len(process.stderr.splitlines()) == 1


def test_a_run_keeps_to_its_text(tmp_path, tiny, monkeypatch):
  """What it began with is recorded: neither a fallback nor a file may turn."""
  first = tmp_path / 'first.txt'
  first.write_text('abcdefgh\n' * 500)
  config = tiny({'data.path': first})
  directory = tmp_path / 'run'
  directory.mkdir()
  experiment.build(config, directory)
  moved = first.rename(tmp_path / 'moved.txt')
  again = tiny({'data.path': moved})
  experiment.build(again, directory)  # The same text in another place.
  vocabulary = (directory / 'vocabulary.json').read_text()
  moved.write_text('hgfedcba\n' * 500)
  with pytest.raises(UserError, match=r'data\.path=.*--allow_changed=data'):
    experiment.build(again, directory)
  assert (directory / 'vocabulary.json').read_text() == vocabulary


def test_a_run_on_the_fallback_stays_on_it(tmp_path, tiny, monkeypatch):
  """Although Tiny Shakespeare, or a network, has come since."""
  monkeypatch.setattr(corpus_lib, '_local_copy', lambda: None)
  monkeypatch.setattr(corpus_lib, '_downloaded', lambda: None)
  config = tiny({'data.path': ''})
  experiment.build(config, tmp_path)
  monkeypatch.setattr(corpus_lib, '_local_copy', lambda: b'what came since')
  trainer = experiment.build(config, tmp_path)
  recorded = json.loads((tmp_path / 'vocabulary.json').read_text())
  assert recorded['corpus'] == 'pydoc_data.topics'
  assert trainer.step == 0


def test_mistakes_of_every_kind_are_told_at_once(tmp_path, run):
  """Of the config, the data and the directory; and nothing is made."""
  (tmp_path / 'file').touch()
  process = run(
    [
      *MAIN,
      '--config=configs/base.py',
      '--config.moe.topk=3',
      '--config.moe.top_k=9',
      '--config.optimizer.learning_rate=nan',
      f'--config.data.path={tmp_path / "missing"}',
      f'--workdir={tmp_path / "file" / "run"}',
    ]
  )
  lines = mistakes(process)
  for words in [
    ('moe.topk', "'moe.top_k'"),
    ('moe.top_k=9', 'moe.num_experts=4'),
    ('learning_rate', 'nan'),
    ('data.path', 'no such file'),
    ('--workdir=',),
  ]:
    assert any(all(word in line for word in words) for line in lines), lines
  assert len(lines) == 5
