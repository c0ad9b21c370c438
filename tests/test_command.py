"""What every command does before its own work."""

import os
import subprocess
import sys

import pytest

from nanomoe import evaluate, generate, main
from nanomoe.run import cache
from tests.shrunk import ROOT

# A command that compiles one program, and tells whether it had to.
SCRIPT = """
from nanomoe.run import cli as command

def main(_):
  import jax
  events = []
  jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
  jax.jit(lambda x: x + 1)(1)
  print('hit' if '/jax/compilation_cache/cache_hits' in events else 'miss')
  return 0

command.run(main, lambda argv: None)
"""


@pytest.fixture
def environment(tmp_path):
  """Of a process: its caches are in tmp_path / 'caches'."""
  of_tests = 'JAX_COMPILATION_CACHE_DIR'
  kept = {k: v for k, v in os.environ.items() if k != of_tests}
  return {
    **kept,
    'XDG_CACHE_HOME': str(tmp_path / 'caches'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def test_a_second_start_compiles_nothing(run, environment, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(SCRIPT)
  environment['PYTHONPATH'] = str(ROOT)
  words = [sys.executable, str(script)]
  first, second = (run(words, env=environment) for _ in range(2))
  assert (first.stdout, second.stdout) == ('miss\n', 'hit\n'), first.stderr
  (directory,) = (tmp_path / 'caches' / 'nanomoe').iterdir()
  assert directory.name.startswith('xla-')
  # A program that was half written when its process was killed.
  for path in directory.glob('*-cache'):
    path.write_bytes(path.read_bytes()[:100])
  third = run(words, env=environment)
  assert third.stdout == 'miss\n'
  assert 'cache' not in third.stderr


def test_a_cache_that_is_set_stands(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for value in ('', '/elsewhere'):
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', value)
    cache.keep_compiled_programs()
    assert os.environ['JAX_COMPILATION_CACHE_DIR'] == value
  assert not list(tmp_path.iterdir())


def test_no_cache_where_nothing_can_be_written(monkeypatch, tmp_path):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  cache.keep_compiled_programs()
  assert 'JAX_COMPILATION_CACHE_DIR' not in os.environ


@pytest.mark.parametrize(
  ('module', 'arguments', 'told'),
  [
    (main, ['--config=configs/base.py'], ['num_train_steps', '[5000]', '-q,']),
    (main, [], ['optimizer.schedule.type', '--config=FILE --help']),
    (generate, [], ['--num_tokens', '[500]', r"['\n']", '--seed']),
    (evaluate, [], ['--data', '--split', '[best]']),
  ],
)
def test_help_is_of_this_command_in_80_columns(
  capsys, monkeypatch, module, arguments, told
):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as left:
    module._parse([module.__name__, *arguments, '--help'])
  assert left.value.code == 0
  text = capsys.readouterr().out
  for word in told:
    assert word in text
  assert max(map(len, text.splitlines())) <= 80
  assert 'absl' not in text and 'undefok' not in text


def test_a_closed_pipe_is_the_end_and_no_bug(environment):
  """As in `python -m nanomoe.main --help | true`."""
  reader, writer = os.pipe()
  os.close(reader)
  process = subprocess.run(
    [sys.executable, '-m', 'nanomoe.main', '--help'],
    cwd=ROOT,
    stdout=writer,
    stderr=subprocess.PIPE,
    env={**environment, 'PYTHONUNBUFFERED': '1'},
  )
  os.close(writer)
  assert (process.returncode, process.stderr) == (141, b'')
