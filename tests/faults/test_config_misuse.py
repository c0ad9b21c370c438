"""Mistakes in a config: a line each, before anything is begun."""

import json
import math
import pathlib
import subprocess
import sys
import tempfile

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest

from configs import base
from faults.conftest import MAIN
from nanomoe import main as main_lib
from nanomoe.config import overrides as config_lib
from nanomoe.config import resume, schema
from nanomoe.data import bpe
from nanomoe.run import workdir as workdir_lib
from tests.shrunk import ROOT
from trainers import spec
from trainers.errors import UserError

BASE = '--config=configs/base.py'
ONE_LINE = 'one line that names key and value; nothing is begun'


def fault(injected, promised=ONE_LINE):
  return pytest.mark.fault(injected=injected, promised=promised)


def asked(*words):
  """What the main command would train after these words, flat."""
  main_lib._FLAGS.unparse_flags()
  config, _ = main_lib.requested_config(main_lib._parse(['main', *words]))
  return dict(schema.flatten(config.to_dict()))


def told(*words) -> list[str]:
  with pytest.raises(UserError) as error:
    asked(*words)
  assert all(line.strip() and '\n' not in line for line in error.value.problems)
  return error.value.problems


def case(injected, words, *parts):
  return pytest.param(words, parts, marks=fault(injected), id=injected)


@pytest.mark.parametrize(
  ('words', 'parts'),
  [
    case('a typo', ['--config.modle.d_model=8'], 'modle', "'model.d_model'"),
    case('a key like no other', ['--config.dd=1'], "'dd'"),
    case('None for a number', ['--config.seed=None'], 'seed', 'None'),
    case('a list for a number', ['--config.seed=[1, 2]'], 'seed', '[1, 2]'),
    case(
      'two values for a number',
      ['--config.optimizer.beta1=0.9,0.99'],
      'beta1',
      '0.9,0.99',
    ),
    case('a bool for an int', ['--config.seed=True'], 'seed', 'True'),
    case('a number for a bool', ['--config.model.bias=1'], 'model.bias'),
    case('nan', ['--config.moe.aux_weight=nan'], 'aux_weight', 'nan'),
    case('infinity', ['--config.moe.aux_weight=-inf'], 'aux_weight', 'inf'),
    case(
      'a number of 5,000 digits', ['--config.seed=' + '9' * 5000], 'seed', '99'
    ),
    case('--config.noflag', ['--config.model.noremat'], 'noremat', 'remat'),
    case('--noconfig.flag', ['--noconfig.model.remat'], 'noconfig'),
    case('an override without a value', ['--config.seed'], 'config.seed'),
    case(
      'a flag in place of a value',
      ['--config.model.bias', '--config.seed=1'],
      'model.bias',
      'true or false',
    ),
    case('a section as a key', ['--config.moe=3'], 'moe', 'section'),
    case('an unknown flag', ['--wrkdir=x'], 'wrkdir', 'workdir'),
    case('a stray word', ['lr=3'], 'lr=3'),
    case(
      'a second value for what is handed to a router',
      ['--config.moe.router.num_experts=7'],
      'moe.router.num_experts',
      'moe.num_experts',
    ),
    case(
      'a second value for what is handed to a dataset',
      ['--config.data.dataset.batch_size=3'],
      'data.dataset.batch_size',
    ),
  ],
)
def test_a_mistake_on_the_command_line(words, parts, happened):
  (line,) = told(BASE, *words)
  for part in parts:
    assert part in line
  assert len(line) < 400
  happened(line[:140])


@fault('1e4 for an int, overrides before --config', 'understood')
def test_ways_that_ml_collections_refuses(happened):
  values = asked('--config.num_train_steps=1e4', BASE)
  assert values['num_train_steps'] == 10_000
  happened('num_train_steps is 10000')


# Config files.


def config_file(directory, body, before=''):
  path = directory / 'mine.py'
  path.write_text(
    'from ml_collections import ConfigDict, config_dict\n'
    'from configs import base\n'
    f'{before}\n'
    'def get_config():\n'
    '  config = base.get_config()\n'
    f'  {body}\n'
    '  return config\n'
  )
  return f'--config={path}'


FILES = [
  ('an unknown section', 'config.modle.d_model = 3', 'line 6', 'modle'),
  ('an unknown key', 'config.model.d_modle = 3', "'model.d_model'"),
  ('a division by zero', '1 / 0', 'line 6', 'ZeroDivisionError'),
  ('a name that is not there', 'config.seed = sede', 'line 6', 'sede'),
  ('SystemExit', 'raise SystemExit(3)', 'line 6', 'SystemExit'),
  ('a number for a section', 'config.model = 3', 'line 6', 'model'),
  ('a key that is no text', 'config[3] = 1', "'int'"),
  ('a key with a dot', 'config["a.b"] = 1', 'line 6', 'a.b'),
  ('a config in itself', 'config.moe.router.x = config', 'Recursion'),
  (
    'an optional placeholder',
    'config.seed = config_dict.placeholder(int)',
    'seed=None',
  ),
  (
    'a required placeholder',
    'config.seed = config_dict.required_placeholder(int)',
    'seed=None',
  ),
  (
    'nan deep in an argument',
    'config.moe.router.x = [1, [float("nan")]]',
    'moe.router.x',
    'finite',
  ),
  (
    'an object',
    'config.callbacks.a = {"type": "A", "x": {1}}',
    'callbacks.a.x',
  ),
  ('a type that is no text', 'config.moe.router = {"type": 3}', 'moe.router'),
]


@pytest.mark.parametrize(
  ('body', 'parts'),
  [
    pytest.param(body, parts, marks=fault(f'in a config file: {what}'), id=what)
    for what, body, *parts in FILES
  ],
)
def test_a_mistake_in_a_file(body, parts, tmp_path, happened):
  (line,) = told(config_file(tmp_path, body))
  for part in parts:
    assert part in line
  happened(line.replace(str(tmp_path), '...')[:140])


@fault('a required placeholder, filled by an override', 'it is used')
def test_a_required_placeholder_that_is_given(tmp_path, happened):
  body = 'config.seed = config_dict.required_placeholder(int)'
  assert asked(config_file(tmp_path, body), '--config.seed=7')['seed'] == 7
  happened('seed is 7')


@fault('a tuple in a config file', 'the run goes on: JSON made a list of it')
def test_a_tuple_comes_back_from_json(tmp_path, happened):
  words = config_file(tmp_path, 'config.moe.router.x = (1, (2, 3))')
  config = config_lib.load_file(words.removeprefix('--config='))
  new = config_lib.apply(
    config, [('precision', 'float32'), ('moe.dispatch', 'dense')]
  )
  workdir_lib.write_json(tmp_path / 'config.json', new.to_dict())
  old = workdir_lib.read_config(tmp_path)
  assert resume.resume_config(old, new, []).moe.router.x == [1, [2, 3]]
  happened('nothing has changed')


# Arguments of plug-ins.


class Pair:
  def __init__(
    self,
    betas: tuple[float, float] = (0.9, 0.99),
    steps: 'list[int] | None' = None,
    rate: float | None = None,
    names: tuple[str, ...] = (),
  ):
    self.values = betas, steps, rate, names


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    pytest.param(key, value, marks=fault(f'{what} for a plug-in'), id=what)
    for what, key, value in [
      ('a tuple that is too short', 'betas', [0.9]),
      ('a tuple that is too long', 'betas', [0.9, 0.99, 0.999]),
      ('a number for a tuple', 'betas', 0.9),
      ('nan in a tuple', 'betas', [0.9, math.nan]),
      ('a bool in a list of ints', 'steps', [1, True]),
      ('a text for a list', 'steps', '12'),
      ('nan for an optional number', 'rate', math.nan),
      ('a number among texts', 'names', ['a', 1]),
    ]
  ],
)
def test_an_argument_of_another_type(key, value, happened):
  with pytest.raises(UserError) as error:
    spec.build('x', {'type': 'Pair', key: value}, {'Pair': Pair})
  (line,) = error.value.problems
  assert f'x.{key}=' in line
  happened(line[:140])


def test_arguments_that_fit():
  built = spec.build(
    'x',
    {'type': 'Pair', 'betas': [0, 0.5], 'steps': [1], 'names': ['a', 'b']},
    {'Pair': Pair},
  )
  assert built.values == ((0, 0.5), [1], None, ('a', 'b'))
  built = spec.build('x', {'type': 'Pair', 'rate': 1}, {'Pair': Pair})
  assert built.values[2] == 1


@pytest.mark.parametrize(
  ('code', 'told_of'),
  [
    pytest.param(code, part, marks=fault(f'a plug-in whose file {what}'))
    for what, code, part in [
      ('raises', 'x = 1\n{}[x]\n', 'KeyError: 1 (broken.py, line 2)'),
      ('is no Python', 'x = = 1\n', 'line 1'),
      ('exits', 'raise SystemExit(0)\n', 'SystemExit'),
    ]
  ],
)
def test_a_plug_in_that_cannot_be_imported(
  code, told_of, tmp_path, monkeypatch, happened
):
  (tmp_path / 'broken.py').write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'broken', raising=False)
  with pytest.raises(UserError) as error:
    spec.build('moe.router', {'type': 'broken.Router'}, {})
  (line,) = error.value.problems
  assert "moe.router.type='broken.Router'" in line
  assert told_of in line
  happened(line)


@fault('a BPE vocabulary of 99,999,999,999 tokens')
def test_a_vocabulary_beyond_any_memory(happened):
  """The library would abort the process."""
  with pytest.raises(ValueError, match='vocab_size=99999999999') as error:
    bpe.BPE(99_999_999_999)
  happened(str(error.value))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('key', 'value', 'part'),
  [
    pytest.param(key, value, part, marks=fault(f'{key}={value}'), id=key)
    for key, value, part in [
      ('moe.router.type', 'os.getcwd', 'Linen module'),
      ('optimizer.schedule.type', 'collections.Counter', 'optax.Schedule'),
      ('data.dataset.type', 'os.getcwd', 'Dataset'),
      ('callbacks.x.type', 'os.getcwd', 'Callback'),
      ('writers.x.type', 'os.getcwd', 'MetricWriter'),
      ('data.tokenizer.type', 'os.getcwd', 'Tokenizer'),
      ('moe.router.type', 'no_such_module.X', 'no_such_module'),
    ]
  ],
)
def test_a_type_of_another_kind(key, value, part, start, tmp_path, happened):
  """Found when it is built: a process that ends with 2 and one line."""
  run = start(tmp_path / 'run', f'--config.{key}={value}')
  assert run.end() == 2
  (line,) = run.output.splitlines()
  assert key in line
  assert part in line
  assert not (tmp_path / 'run').exists()
  happened(line[:140])


# Anything at all.

_keys = st.sampled_from(
  [
    *schema.FIELDS,
    'moe.router.type',
    'moe.router.num_groups',
    'optimizer.schedule.warmup_steps',
    'callbacks.a.type',
    'callbacks.early_stopping.patience',
    'writers.w.x.y',
    'data.tokenizer',
    'optimizer.betas',
    '',
    '.',
  ]
)
_values = st.one_of(
  st.text(max_size=12),
  st.integers(-3, 600).map(str),
  st.floats().map(repr),
  st.booleans().map(str),
  st.sampled_from(
    ['nan', '-inf', '1e999', 'None', '(1,)', '[1, 2]', '{}', '1e4', '0x1', '']
  ),
)
_words = st.one_of(
  st.builds('--config.{}={}'.format, _keys, _values),
  st.builds('--config.{}'.format, _keys),
  st.builds('--{}={}'.format, st.sampled_from(['q', 'init_from']), _values),
  st.sampled_from([BASE, '--config=configs/quick.py', '--config', '-q', '--']),
)


@fault(
  'hypothesis: hundreds of random command lines',
  'a checked config without nan, bool for int or lists for numbers, or a '
  'UserError with one line each',
)
@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(st.lists(_words, max_size=5))
@example([BASE, '--config.seed=True', '--config.optimizer.beta1=nan'])
def test_any_command_line(words):
  try:
    values = asked(BASE, *words)
  except UserError as error:
    assert error.problems
    assert all(p.strip() and '\n' not in p for p in error.problems)
    return
  for key, field in schema.FIELDS.items():
    assert type(values[key]) is field.kind
    assert field.kind is not float or math.isfinite(values[key])
  text = json.dumps(values, allow_nan=False)
  assert json.loads(text) == values


_json = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
  ),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.dictionaries(
      st.text(max_size=5) | st.sampled_from(['type', 'x', 'd_model']),
      inner,
      max_size=3,
    ),
  ),
  max_leaves=6,
)


@fault(
  "hypothesis: a run's config.json with random values in random places",
  'one line each, or a sound config',
)
@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(st.lists(st.tuples(_keys, st.booleans(), _json), min_size=1, max_size=3))
def test_any_config_json(changes):
  values = base.get_config().to_dict()
  for key, whole, value in changes:
    *sections, name = key.split('.')
    section = values
    for part in sections[:1] if whole else sections:
      section = section.setdefault(part, {})
      if not isinstance(section, dict):
        break
    else:
      section[name] = value
  with tempfile.TemporaryDirectory() as directory:
    pathlib.Path(directory, 'config.json').write_text(json.dumps(values))
    try:
      found = asked(f'--workdir={directory}')
    except UserError as error:
      assert error.problems
      assert all(p.strip() for p in error.problems)
      return
  for key, field in schema.FIELDS.items():
    assert type(found[key]) is field.kind


@fault('three of them at once, as a process', 'three lines, exit code 2')
def test_mistakes_as_a_process(tmp_path, happened):
  words = [
    config_file(tmp_path, 'config.model.d_modle = 3'),
    '--config.seed=True',
    '--config.optimizer.beta1=nan',
    f'--workdir={tmp_path / "run"}',
  ]
  process = subprocess.run(
    [*MAIN, *words], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  assert process.returncode == 2
  lines = process.stderr.splitlines()
  assert len(lines) == 3
  assert all(line.startswith('error: ') for line in lines)
  assert not (tmp_path / 'run').exists()
  happened('3 lines, exit code 2, no directory')
