"""The `nanomoe` command: its commands, lists and completion."""

import shutil
import subprocess
import sys

import pytest

import nanomoe
from nanomoe import console
from nanomoe.config import schema
from nanomoe.moe.routers import ROUTERS
from tests.shrunk import ROOT
from trainers.errors import UserError

NANOMOE = [sys.executable, '-m', 'nanomoe']


def test_version_and_usage():
  assert console.answer(['--version']) == f'nanomoe {nanomoe.__version__}'
  for name in (*console.COMMANDS, 'list', 'completion', '--version'):
    assert f'\n  {name}' in console.answer([])
  assert console.answer(['--help']) == console.answer([])


@pytest.mark.parametrize('kind', console.KINDS)
def test_a_list_has_a_line_for_each_part(kind):
  lines = console.listing(kind).splitlines()
  assert lines
  for line in lines:
    name, _, meaning = line.partition('  ')
    assert name
    assert meaning.strip().endswith('.')


def test_the_lists_are_those_of_the_code():
  names = [line.split()[0] for line in console.listing('routers').splitlines()]
  assert names == list(ROUTERS)
  names = {line.split()[0] for line in console.listing('configs').splitlines()}
  assert names == {
    f'configs/{path.name}'
    for path in (ROOT / 'configs').glob('*.py')
    if path.stem != '__init__'
  }


@pytest.mark.parametrize(
  ('words', 'hint'),
  [
    (['trian'], 'train'),
    (['list'], 'routers'),
    (['list', 'router'], 'routers'),
    (['list', 'routers', 'configs'], 'routers'),
    (['completion', 'basch'], 'bash'),
    (['--config=configs/base.py'], 'train'),
  ],
)
def test_an_unknown_command_is_one_line(words, hint):
  with pytest.raises(UserError) as error:
    console.answer(words)
  (line,) = error.value.problems
  assert hint in line


@pytest.mark.parametrize(
  ('words', 'code', 'shown'),
  [
    (['train', '--help'], 0, '--config.moe.top_k'.removeprefix('--config.')),
    (['generate', '--workdir=missing'], 2, 'missing'),
    (['trian'], 2, 'train'),
  ],
)
def test_the_command_as_a_process(run, words, code, shown):
  process = run([*NANOMOE, *words])
  assert process.returncode == code, process.stderr
  assert shown in process.stdout + process.stderr
  assert 'Traceback' not in process.stderr


@pytest.mark.skipif(not shutil.which('bash'), reason='there is no bash')
@pytest.mark.parametrize(
  ('typed', 'offered'),
  [
    (['tr'], 'train'),
    (['list', 'rou'], 'routers'),
    (['train', '--config.moe.top'], '--config.moe.top_k='),
    (['evaluate', '--sp'], '--split='),
    (['plan', '--config.moe.top'], '--config.moe.top_k='),
    (['plan', '--mf'], '--mfu='),
    (['train', '--qu'], '--quiet'),
  ],
)
def test_bash_completes(typed, offered):
  words = ' '.join(['nanomoe', *typed])
  script = (
    f'{console.completion("bash")}\nCOMP_WORDS=({words})\n'
    f'COMP_CWORD={len(typed)}\n_nanomoe\necho "${{COMPREPLY[@]}}"'
  )
  out = subprocess.run(
    ['bash', '-c', script], capture_output=True, text=True, check=True
  )
  assert out.stdout.split() == [offered]


def test_completion_knows_every_key():
  script = console.completion('zsh')
  assert 'bashcompinit' in script
  for key in schema.FIELDS:
    assert f'--config.{key}=' in script
