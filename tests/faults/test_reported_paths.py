"""Links and `~` where a path is given; files that hide packages."""

import inspect
import os
import pathlib
import pickle
import random
import subprocess
import sys
import typing

import pytest

from configs import base
from faults.conftest import MAIN, fault
import nanomoe
from nanomoe import evaluate, generate
from nanomoe import main as main_lib
from nanomoe.config import overrides as config_lib
from nanomoe.data import corpus as corpus_lib
from nanomoe.run import cache, cli, trusted_imports
from nanomoe.run import workdir as workdir_lib
from tests.shrunk import ROOT, TINY
from trainers.errors import UserError

ONE_LINE = 'one line, exit code 2; nothing is made'


def reported(row, injected, promised=ONE_LINE):
  """The marks of a test of a row of the report."""

  def mark(test):
    return pytest.mark.reported(row)(fault(injected, promised)(test))

  return mark


def case(row, what, *values, promised=ONE_LINE):
  marks = [pytest.mark.reported(row), fault(what, promised)]
  return pytest.param(*values, marks=marks, id=what)


def one_line(call, *args, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  (line,) = error.value.problems
  assert '\n' not in line
  return line


def asked(*words):
  """The config that the main command would train with."""
  main_lib._FLAGS.unparse_flags()
  return main_lib.requested_config(main_lib._parse(['main', *words]))[0]


def process(directory, *words, env=None):
  """The main command, started in `directory`; this NanoMoE is installed."""
  return subprocess.run(
    [*MAIN, *words],
    cwd=directory,
    env={**os.environ, 'PYTHONPATH': str(ROOT), **(env or {})},
    capture_output=True,
    text=True,
    timeout=60,
  )


# Row 2: directories that cannot be made.


@pytest.fixture
def bounded(monkeypatch):
  """A loop over free names ends after 50: forever, for a test."""
  with monkeypatch.context() as patch:
    patch.setattr(workdir_lib.itertools, 'count', lambda n: range(n, 50))
    yield


@pytest.mark.parametrize(
  'make',
  [
    case('2', 'runs is a dangling link', lambda p: p.symlink_to('nowhere')),
    case('2', 'runs is a link to itself', lambda p: p.symlink_to(p)),
    case('2', 'runs is a file', pathlib.Path.touch),
    case('2', 'runs is a link to a file', lambda p: p.symlink_to('file')),
    case(
      '2',
      'runs is a link to a directory in a dangling link',
      lambda p: p.symlink_to('dangling/below'),
    ),
  ],
)
def test_runs_is_no_directory(tmp_path, monkeypatch, happened, bounded, make):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').touch()
  (tmp_path / 'dangling').symlink_to('nowhere')
  make(tmp_path / 'runs')
  before = sorted(os.listdir(tmp_path))
  line = one_line(workdir_lib.make_default, 'configs/base.py')
  assert 'runs' in line
  assert sorted(os.listdir(tmp_path)) == before
  happened(line.replace(str(tmp_path), '...')[:120])


@reported('2', 'the command where runs is a dangling link, without --workdir')
def test_the_command_ends_where_runs_is_a_dangling_link(tmp_path, happened):
  (tmp_path / 'runs').symlink_to('nowhere')
  done = process(tmp_path, '--config=configs/base.py')
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert 'runs' in line
  happened(f'exit code 2: {line.split(" cannot")[-1]}'[:120])


@reported(
  '2',
  'runs is a link to an empty directory, two starts in the same second',
  'each has a directory of its own',
)
def test_runs_may_be_a_link(tmp_path, monkeypatch, happened, bounded):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'elsewhere').mkdir()
  (tmp_path / 'runs').symlink_to('elsewhere')
  paths = {workdir_lib.make_default('base.py') for _ in range(3)}
  assert len(paths) == len(list((tmp_path / 'elsewhere').iterdir())) == 3
  happened('three starts, three directories')


@pytest.mark.parametrize(
  'below',
  [
    case('2', '--workdir is a dangling link', ''),
    case('2', '--workdir is below a dangling link', 'a/b'),
  ],
)
@pytest.mark.parametrize('target', ['nowhere', 'link'])
def test_a_workdir_by_a_dangling_link(tmp_path, happened, below, target):
  (tmp_path / 'link').symlink_to(target)
  words = f'--workdir={tmp_path / "link" / below}'
  line = one_line(asked, '--config=configs/base.py', words)
  assert str(tmp_path / 'link') in line
  assert not (tmp_path / 'nowhere').exists()
  happened(line.replace(str(tmp_path), '...')[:120])


@reported('2', 'a current directory that was deleted')
def test_no_current_directory(tmp_path, happened):
  script = 'd=$(mktemp -d); cd "$d"; rmdir "$d"; exec "$@"'
  done = subprocess.run(
    ['bash', '-c', script, 'x', *MAIN, '--config=configs/base.py'],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert 'current directory' in line
  happened(line[:120])


# Row 8: what is in the current directory hides packages.

PACKAGES = ('trainers', 'configs', 'flax', 'benchmarks')
MODULES = (
  *('jax', 'clu', 'optax', 'numpy', 'absl', 'orbax', 'google', 'rich'),
  *('tokenizers', 'typing_extensions', 'random', 'queue', 'tempfile'),
)
HIDDEN = "raise SystemExit(f'{__file__} was imported')"
CONFIG = """
from configs import base, common

def get_config():
  config = base.get_config()
  config.seed = common.SEED
  return config
"""


@reported(
  '8',
  'packages trainers/, configs/, flax/ and files jax.py, clu.py, random.py '
  'in the current directory',
  'the command runs; configs/ may hold files of the user',
)
def test_files_that_hide_packages(tmp_path, corpus, happened):
  for name in PACKAGES:
    (tmp_path / name).mkdir()
    (tmp_path / name / '__init__.py').write_text(HIDDEN)
  for name in MODULES:
    (tmp_path / f'{name}.py').write_text(HIDDEN)
  (tmp_path / 'configs' / 'mine.py').write_text(CONFIG)
  (tmp_path / 'configs' / 'common.py').write_text('SEED = 7')
  # The mistake is found last, when everything has been imported.
  done = process(
    tmp_path,
    '--config=configs/mine.py',
    f'--config.data.path={corpus}',
    f'--workdir={tmp_path / "run"}',
    '--config.callbacks.early_stopping.patience=never',
    *(f'--config.{key}={value}' for key, value in TINY.items()),
  )
  assert done.returncode == 2, done.stderr[-2000:]
  (line,) = done.stderr.splitlines()
  assert 'callbacks.early_stopping.patience' in line
  assert not (tmp_path / 'run').exists()
  happened('all imports are of what is installed')


EDITABLE = """
import os, sys
from importlib import util

root = sys.argv[1]

class Finder:
  # As setuptools makes it: behind all of sys.path.
  @staticmethod
  def find_spec(name, path=None, target=None):
    place = os.path.join(root, name, '__init__.py')
    if path is None and os.path.exists(place):
      return util.spec_from_file_location(name, place)

sys.path[:] = [os.getcwd(), *(p for p in sys.path if p not in ('', root))]
sys.meta_path.append(Finder)
from nanomoe.config import overrides as config
config.load_file('configs/quick.py')
import configs, trainers
print(trainers.__file__, configs.__file__, sys.path[0] == os.getcwd())
"""


@reported(
  '8',
  'empty directories trainers/ and configs/, and an editable installation',
  'the installed packages are imported',
)
def test_empty_directories_that_hide_packages(tmp_path, happened):
  for name in ('trainers', 'configs'):
    (tmp_path / name).mkdir()
  done = subprocess.run(
    [sys.executable, '-c', EDITABLE, str(ROOT)],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  trainers_file, configs_file, first = done.stdout.split()
  assert pathlib.Path(trainers_file) == ROOT / 'trainers' / '__init__.py'
  assert pathlib.Path(configs_file) == ROOT / 'configs' / '__init__.py'
  assert first == 'True'  # A program's own sys.path stays as it is.
  happened('both are ours')


@reported('8', 'an empty directory nanomoe/, and an editable installation')
def test_a_directory_that_hides_nanomoe(monkeypatch, capsys, happened):
  monkeypatch.setenv('GLIBC_TUNABLES', 'x')  # It starts no other process.
  monkeypatch.setattr(nanomoe, '__file__', None)
  monkeypatch.setattr(nanomoe, '__path__', ['/project/nanomoe'])
  with pytest.raises(SystemExit) as error:
    cli.run(lambda _: 0, list)
  assert error.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert '/project/nanomoe' in line
  happened(line[:120])


@reported(
  '8',
  'a program that has imported a package trainers of its own',
  'ImportError that names it',
)
def test_another_package_of_this_name(tmp_path, monkeypatch, happened):
  (tmp_path / 'hidden.py').touch()
  monkeypatch.syspath_prepend(tmp_path)
  __import__('hidden')
  try:
    with pytest.raises(ImportError, match=str(tmp_path)) as error:
      nanomoe.import_own('hidden')
  finally:
    del sys.modules['hidden']
  happened(str(error.value).replace(str(tmp_path), '...')[:120])


# Row 12: `~`.


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The user's home directory; the current directory is another one."""
  path = tmp_path / 'home'
  (path / 'here').mkdir(parents=True)
  monkeypatch.setenv('HOME', str(path))
  monkeypatch.chdir(path / 'here')
  (path / 'text.txt').write_text('abcdefgh\n' * 100)
  (path / 'my.py').write_text(
    'from configs import base\n'
    'def get_config():\n'
    '  config = base.get_config()\n'
    "  config.data.path = '~/text.txt'\n"
    '  return config\n'
  )
  run = path / 'run'
  run.mkdir()
  config = config_lib.apply(base.get_config(), [])
  workdir_lib.write_json(run / 'config.json', config.to_dict())
  yield path
  assert not (path / 'here' / '~').exists()


def expanded(row, what, *values):
  return case(row, f'{what} with ~', *values, promised='the home directory')


TOKENIZER = '--config.data.tokenizer.type=BPE'


@pytest.mark.parametrize(
  ('words', 'key', 'name'),
  [
    expanded(
      '12',
      '--config.data.path',
      ['--config.data.path=~/text.txt'],
      'data.path',
      'text.txt',
    ),
    expanded('12', '--init_from', ['--init_from=~/run'], 'init_from', 'run'),
    expanded(
      '12',
      '--config.init_from',
      ['--config.init_from=~/run'],
      'init_from',
      'run',
    ),
    expanded(
      '12',
      'data.tokenizer.file',
      [TOKENIZER, '--config.data.tokenizer.file=~/t.json'],
      'data.tokenizer.file',
      't.json',
    ),
    expanded(
      '12',
      '--config, and data.path in that file',
      ['--config=~/my.py'],
      'data.path',
      'text.txt',
    ),
  ],
)
def test_tilde_in_a_path_of_the_config(home, happened, words, key, name):
  values = dict(
    main_lib.schema.flatten(asked('--config=configs/base.py', *words).to_dict())
  )
  assert values[key] == str(home / name)
  happened(f'~/{name} in the home directory; config.json has the whole path')


@reported('12', '--workdir and --data with ~', 'the home directory')
def test_tilde_in_the_workdir(home, happened):
  for flags in (main_lib, evaluate, generate):
    flags._FLAGS.unparse_flags()
  main_lib._parse(['main', '--config=configs/base.py', '--workdir=~/a'])
  assert main_lib._workdir() == home / 'a'
  for read in (
    lambda path: evaluate.evaluate(path, 'val', 'best'),
    lambda path: generate.generate(path, ['a']),
  ):
    for path in ('~/a', pathlib.Path('~/a')):
      assert str(home / 'a') in one_line(read, path)
  line = one_line(evaluate.evaluate, '~/run', 'val', 'best', '~/a.txt')
  assert str(home / 'a.txt') in line
  happened('main, evaluate (--data too) and generate find it there')


@reported(
  '12',
  '~ in NANOMOE_DATA_DIR, XDG_* and JAX_COMPILATION_CACHE_DIR',
  'the home directory',
)
def test_tilde_in_variables(home, monkeypatch, happened):
  for name in (
    'NANOMOE_DATA_DIR',
    'XDG_CACHE_HOME',
    'XDG_STATE_HOME',
    'JAX_COMPILATION_CACHE_DIR',
  ):
    monkeypatch.setenv(name, f'~/{name}')
  cache.keep_compiled_programs()
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == str(
    home / 'JAX_COMPILATION_CACHE_DIR'
  )
  assert list(corpus_lib._directories()) == [
    home / 'NANOMOE_DATA_DIR',
    home / 'XDG_CACHE_HOME' / 'nanomoe',
  ]
  assert trusted_imports._file().is_relative_to(home / 'XDG_STATE_HOME')
  happened('each is below it')


@pytest.mark.parametrize(
  'words',
  [
    case('12', f'{word}=~nobody_x/a', word)
    for word in (
      '--workdir',
      '--config',
      '--init_from',
      '--config.data.path',
      '--config.init_from',
      '--config.data.tokenizer.file',
    )
  ],
)
def test_an_unknown_home(home, happened, words):
  line = one_line(
    asked, '--config=configs/base.py', TOKENIZER, f'{words}=~nobody_x/a'
  )
  assert words.rpartition('-')[2].removeprefix('config.') in line
  assert '~nobody_x' in line
  assert sorted(os.listdir()) == []
  happened(line[:120])


@pytest.mark.parametrize(
  'name',
  [
    case('12', f'{name}=~nobody_x/a', name)
    for name in (
      'NANOMOE_DATA_DIR',
      'XDG_CACHE_HOME',
      'JAX_COMPILATION_CACHE_DIR',
    )
  ],
)
def test_an_unknown_home_in_a_variable(home, monkeypatch, happened, name):
  monkeypatch.setenv(name, '~nobody_x/a')
  read = {
    'NANOMOE_DATA_DIR': lambda: list(corpus_lib._directories()),
    'XDG_CACHE_HOME': cache.directory,
    'JAX_COMPILATION_CACHE_DIR': cache.keep_compiled_programs,
  }[name]
  line = one_line(read)
  assert name in line
  happened(line[:120])


# Row 13: config files are modules.

POSTPONED = """
from __future__ import annotations
import dataclasses, enum, typing
from configs import base

@dataclasses.dataclass
class Size:
  width: int = 16
  kind: typing.ClassVar[str] = 'x'

class Point(typing.NamedTuple):
  size: Size

class Kind(enum.Enum):
  SMALL = Size(16)

def get_config():
  config = base.get_config()
  config.model.d_model = Kind.SMALL.value.width
  return config
"""


@pytest.fixture
def loaded():
  """loaded(path) -> the module that the config file has become."""
  before = dict(sys.modules)
  for name in before:
    if name.startswith('config_file_'):
      del sys.modules[name]

  def load(path):
    assert config_lib.load_file(str(path)) is not None
    (name,) = [n for n in sys.modules if n.startswith('config_file_')]
    return sys.modules[name]

  yield load
  sys.modules.pop('neighbour_of_config', None)


@reported(
  '13',
  'a config file with postponed annotations, dataclass, NamedTuple and enum',
  'it is read; typing, inspect and pickle find its classes',
)
def test_a_config_file_is_a_module(tmp_path, loaded, happened):
  path = tmp_path / 'my.py'
  path.write_text(POSTPONED)
  module = loaded(path)
  assert typing.get_type_hints(module.Point) == {'size': module.Size}
  assert 'width: int = 16' in inspect.getsource(module.Size)
  assert pickle.loads(pickle.dumps(module.Size(3))) == module.Size(3)
  assert [f.name for f in module.dataclasses.fields(module.Size)] == ['width']
  happened('all of them')


@pytest.mark.parametrize(
  'name',
  [
    case(
      '13',
      f'a config file named {name!r}',
      name,
      promised='it is read; no module is replaced',
    )
    for name in ('random.py', 'my run.v2.py', 'ü-1.py', '1.py')
  ],
)
def test_names_of_config_files(tmp_path, monkeypatch, loaded, happened, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / name).write_text(POSTPONED)
  loaded(name)
  assert sys.modules['random'] is random
  happened('read')


@reported('13', 'a config file that imports a file beside it', 'it is found')
def test_a_neighbour_of_a_config_file(tmp_path, loaded, happened):
  (tmp_path / 'neighbour_of_config.py').write_text('WIDTH = 32')
  (tmp_path / 'my.py').write_text(
    'from configs import base\n'
    'def get_config():\n'
    '  import neighbour_of_config\n'
    '  config = base.get_config()\n'
    '  config.model.d_model = neighbour_of_config.WIDTH\n'
    '  return config\n'
  )
  before = list(sys.path)
  module = loaded(tmp_path / 'my.py')
  assert module.get_config().model.d_model == 32
  assert sys.path == before
  happened('found; sys.path is as it was')


@reported('13', 'a config file that raises, by a relative path', ONE_LINE)
def test_a_config_file_that_raises(tmp_path, monkeypatch, happened):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'my.py').write_text('import json\nx = 1\njson.loads("{")\n')
  sys.modules.pop('config_file_my', None)
  before = list(sys.path)
  line = one_line(config_lib.load_file, 'my.py')
  assert '(my.py, line 3)' in line
  assert 'config_file_my' not in sys.modules
  assert sys.path == before
  happened(line[:120])
