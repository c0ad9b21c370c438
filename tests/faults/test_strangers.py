"""A run from somebody else is data: nothing of it runs, none leads outside."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from configs import base
from faults.conftest import MAIN
from nanomoe import evaluate, generate
from nanomoe import main as main_lib
from nanomoe.config import overrides as config_lib
from nanomoe.data import bpe, tokenizers
from nanomoe.run import trusted_imports, workdir
from tests.shrunk import ROOT
from trainers.checkpoint import reader
from trainers.errors import UserError

POLICY = (
  'one line that names it; it is not imported: this user has never named it'
)


def fault(injected, promised=POLICY):
  return pytest.mark.fault(injected=injected, promised=promised)


@pytest.fixture
def state(tmp_path, monkeypatch):
  """What this user has named before: nothing."""
  monkeypatch.setenv('XDG_STATE_HOME', str(tmp_path / 'state'))
  return tmp_path / 'state' / 'nanomoe' / 'imports.txt'


@pytest.fixture
def code(tmp_path, monkeypatch):
  """A module whose import, and whose call, leave a mark."""
  directory = tmp_path / 'code'
  directory.mkdir()
  mark = tmp_path / 'mark'
  (directory / 'strange.py').write_text(
    f'import pathlib\npathlib.Path({str(mark)!r}).touch()\n'
    'def Thing(**arguments):\n  raise SystemExit(0)\n'
  )
  monkeypatch.syspath_prepend(directory)
  monkeypatch.delitem(sys.modules, 'strange', raising=False)
  return mark


def stranger(directory, key, kind, **arguments):
  """A run whose config.json names code."""
  config = config_lib.apply(base.get_config(), [])
  values = config.to_dict()
  *sections, name = key.split('.')
  section = values
  for part in sections:
    section = section[part]
  section[name] = {'type': kind, **arguments}
  directory.mkdir(exist_ok=True)
  workdir.write_json(directory / 'config.json', values)
  return directory


def train(*words):
  main_lib._FLAGS.unparse_flags()
  return main_lib.requested_config(main_lib._parse(['main', *words]))[0]


COMMANDS = {
  'main': lambda run: train(f'--workdir={run}'),
  'generate': lambda run: generate.generate(run, ['a']),
  'evaluate': lambda run: evaluate.evaluate(run, 'val', 'best'),
}


@pytest.mark.parametrize(
  ('command', 'key'),
  [
    pytest.param(
      command,
      key,
      marks=fault(f'{command}: config.json has {key}.type = os.system'),
    )
    for command, key in [
      ('main', 'callbacks.x'),
      ('main', 'writers.x'),
      ('main', 'moe.router'),
      ('main', 'data.tokenizer'),
      ('generate', 'moe.router'),
      ('generate', 'data.tokenizer'),
      ('evaluate', 'data.tokenizer'),
      ('evaluate', 'data.dataset'),
    ]
  ],
)
def test_code_that_config_json_names(tmp_path, state, happened, command, key):
  mark = tmp_path / 'mark'
  run = stranger(tmp_path / 'run', key, 'os.system', command=f'touch {mark}')
  with pytest.raises(UserError) as error:
    COMMANDS[command](run)
  (line,) = error.value.problems
  assert 'os.system' in line
  assert '--allow_imports=os.system' in line
  assert not mark.exists()
  happened(line)


@fault(
  'the same as a process, of a module in the directory that we are in',
  f'{POLICY}; exit code 2',
)
def test_as_a_process(tmp_path, state, code, happened):
  run = stranger(tmp_path / 'run', 'callbacks.x', 'strange.Thing')
  process = subprocess.run(
    [*MAIN, f'--workdir={run}'],
    cwd=tmp_path / 'code',
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert process.returncode == 2
  (line,) = process.stderr.splitlines()
  assert 'strange.Thing' in line
  assert not code.exists()
  happened(line)


def test_what_this_user_has_named_before(tmp_path, state, code):
  """By --allow_imports, by a type on the command line, or in a --config."""
  run = stranger(tmp_path / 'run', 'callbacks.x', 'strange.Thing')
  words = f'--workdir={run}'
  with pytest.raises(UserError):
    train(words)
  assert train(words, '--allow_imports=other.Thing,strange.Thing')
  assert train(words)  # It is remembered.
  assert state.read_text() == 'strange.Thing\n'
  other = stranger(tmp_path / 'other', 'moe.router', 'mine.Router')
  with pytest.raises(UserError, match=r'mine\.Router'):
    train(f'--workdir={other}')
  own = '--config.moe.router.type=mine.Router'
  assert train(f'--workdir={other}', own).moe.router.type == 'mine.Router'
  assert train(
    '--config=configs/base.py', '--config.moe.router.type=mine.Router'
  )
  trusted_imports.remember({'mine.Router'})  # As experiment.build does.
  assert train(f'--workdir={other}')
  with pytest.raises(UserError, match=r'strange\.Other') as error:
    train(f'--workdir={stranger(run, "writers.y", "strange.Other")}')
  assert 'strange.Thing' not in str(error.value)


def test_names_of_ours_need_no_permission(tmp_path, state):
  run = stranger(tmp_path / 'run', 'moe.router', 'Softmax')
  assert train(f'--workdir={run}').moe.router.type == 'Softmax'
  assert not state.exists()


@fault(
  'no place to remember what a user has named',
  'it has to be named each time; nothing fails',
)
def test_no_place_to_remember(tmp_path, state, happened):
  state.parent.parent.write_text('in the way')
  run = stranger(tmp_path / 'run', 'callbacks.x', 'strange.Thing')
  for _ in range(2):
    with pytest.raises(UserError, match='--allow_imports'):
      train(f'--workdir={run}')
    assert train(f'--workdir={run}', '--allow_imports=strange.Thing')
  happened('--allow_imports works, twice')


@pytest.mark.parametrize(
  'step',
  [
    pytest.param(
      step,
      marks=fault(
        f'--step={step}, with a directory there', 'no such checkpoint'
      ),
    )
    for step in ('../outside', '/etc', '-1', '007', '٣')
  ],
)
def test_a_step_is_a_number(tmp_path, happened, step):
  (tmp_path / 'outside').mkdir()
  for name in ('7', '007', '3'):
    (tmp_path / 'checkpoints' / name).mkdir(parents=True)
  with pytest.raises(UserError) as error:
    reader.read(tmp_path / 'checkpoints', step)
  assert 'there is no such checkpoint' in error.value.problems[0]
  happened(error.value.problems[0].replace(str(tmp_path), '...')[:120])


@fault(
  'a run whose config.json names /etc/passwd as its tokenizer.json',
  'not opened: a run has its vocabulary in vocabulary.json',
)
def test_a_path_in_a_tokenizer(tmp_path, happened, monkeypatch):
  tokenizer = bpe.BPE(300)
  tokenizer.fit({'train': 'the cat, the hat ' * 9})
  known = {'corpus': '../../etc/passwd', 'corpus_sha256': ''}
  path = tmp_path / 'vocabulary.json'
  workdir.write_json(path, {**tokenizer.state_dict(), **known})
  opened, watching = [], [True]  # A hook cannot be taken away.
  sys.addaudithook(
    lambda event, args: (
      watching and event == 'open' and opened.append(str(args[0]))
    )
  )
  spec = {'type': 'BPE', 'file': '/etc/passwd'}
  try:
    assert tokenizers.load(spec, path).vocab_size == tokenizer.vocab_size
  finally:
    watching.clear()
  assert str(path) in opened
  assert not [name for name in opened if 'passwd' in name]
  happened('only vocabulary.json was opened')


@fault(
  'a tokenizer.json with one token of index 2**31',
  'refused: a table of all indices would fill the memory',
)
def test_a_token_far_beyond_the_others(happened):
  tokenizer = bpe.BPE(300)
  tokenizer.fit({'train': 'the cat, the hat ' * 9})
  state = json.loads(json.dumps(tokenizer.state_dict()))
  state['tokenizer']['model']['vocab']['a'] = 2**31
  with pytest.raises(ValueError, match=str(2**31)) as error:
    bpe.BPE().load_state_dict(state)
  happened(str(error.value))


def test_no_code_of_ours_unpickles():
  """Nor runs text, nor lets NumPy unpickle."""
  words = r'\b(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal|exec)\b'
  found = [
    f'{path}: {line}'
    for package in ('nanomoe', 'trainers')
    for path in (ROOT / package).rglob('*.py')
    for line in path.read_text().splitlines()
    if re.search(words, line) or 'allow_pickle' in line or ' eval(' in line
  ]
  assert found == []


WATCHED = """
import os, runpy, sys
seen = open(sys.argv[1], 'w', buffering=1)
def watch(event, args):
  writes = event == 'open' and args[1] and set(str(args[1])) & set('wax+')
  if event in ('pickle.find_class', 'os.system', 'subprocess.Popen') or writes:
    seen.write(f'{event} {args[0]}\\n')
sys.addaudithook(watch)
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
"""


@fault(
  "generate and evaluate of a stranger's run, watched by an audit hook",
  'nothing is unpickled, no process is started, nothing is written but to '
  "JAX's cache",
)
@pytest.mark.slow
def test_what_reading_a_run_does(finished, tmp_path, happened):
  run = shutil.copytree(finished[0], tmp_path / 'run')
  cache = tmp_path / 'cache'
  env = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(cache)}
  env['GLIBC_TUNABLES'] = ''  # It need not start itself again.
  for words in (
    ['nanomoe.generate', '--prompt=a', '--num_tokens=5'],
    ['nanomoe.evaluate'],
  ):
    seen = tmp_path / 'seen.txt'
    process = subprocess.run(
      [sys.executable, '-c', WATCHED, str(seen), *words, f'--workdir={run}'],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=100,
      env=env,
    )
    assert process.returncode == 0, process.stderr
    lines = [
      line
      for line in seen.read_text().splitlines()
      if not any(w in line for w in (str(cache), '/dev/null', '/proc/self'))
    ]
    assert lines == []
  happened('neither; the cache alone was written')
