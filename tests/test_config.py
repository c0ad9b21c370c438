"""From the command line to a checked config, and a run's own config."""

import fcntl
import json
import logging
import math
import os
import re
import threading

from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
import pytest

from configs import base
from nanomoe import experiment
from nanomoe.config import older, resume, schema, validation
from nanomoe.config import overrides as config_lib
from nanomoe.run import history
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError
from trainers.files import to_json

# A top_k and a number of heads that go with any experts and any width.
LEAST = [('moe.top_k', '1'), ('model.num_heads', '1')]


def parsed(*words):
  """base.py's values, flat, after `words` of a command line."""
  _, overrides = config_lib.split_arguments(list(words))
  return applied(*overrides)


def applied(*overrides):
  return flat(config_lib.apply(base.get_config(), list(overrides)))


def flat(config):
  return dict(schema.flatten(config.to_dict()))


def mistakes(*overrides, config=None):
  with pytest.raises(UserError) as error:
    config_lib.apply(config or base.get_config(), list(overrides))
  return error.value.problems


def hint(line):
  """The key that a message proposes, or None."""
  match = re.search(r"mean '([^']*)'", line)
  return match and match[1]


# Writing overrides.


@pytest.mark.parametrize(
  'words',
  [
    ['--config.moe.d_ff=48'],
    ['--config.moe.d_ff', '48'],
    ['-config.moe.d_ff=48'],
    ['--config.moe.d_ff=7', '--config.moe.d_ff=48'],
    ['--config.moe.d_ff=7', '--config.moe.d_ff', '48'],
    ['--config.moe.d_ff=4.8e1'],
  ],
  ids=' '.join,
)
def test_ways_of_writing_an_override(words):
  expected = {**parsed(), 'moe.d_ff': 48}
  assert parsed(*words) == expected


def test_other_words_stay_in_their_order():
  rest, overrides = config_lib.split_arguments(
    [
      'main',
      '--config.seed=1',
      '--config=a.py',
      '--config.data.path',
      'x=y z',
      '--workdir',
      'w',
      '--config.moe.router.type=a=b\nc',
    ]
  )
  assert rest == ['main', '--config=a.py', '--workdir', 'w']
  assert overrides == [
    ('seed', '1'),
    ('data.path', 'x=y z'),
    ('moe.router.type', 'a=b\nc'),
  ]


def test_nothing_is_an_override_after_two_dashes():
  words = ['main', '--', '--config.seed=1']
  assert config_lib.split_arguments(words) == (words, [])


def test_an_override_without_a_value_is_named():
  with pytest.raises(UserError, match=r'config\.seed'):
    config_lib.split_arguments(['main', '--config.seed'])


@pytest.mark.parametrize(
  'key, text, value',
  [
    ('num_train_steps', '1e4', 10_000),
    ('num_train_steps', '20.0', 20),
    ('seed', '4294967295', 2**32 - 1),
    ('eval_iters', '-0', 0),
    ('optimizer.learning_rate', '1e-3', 0.001),
    ('optimizer.learning_rate', '.5', 0.5),
    ('model.dropout_rate', '0', 0.0),
    ('moe.aux_weight', '2', 2.0),
    ('data.path', '', ''),
    ('data.path', '1e4', os.path.abspath('1e4')),
    ('data.path', 'a=b c', os.path.abspath('a=b c')),
    ('data.fallback', '', ''),
    ('precision', 'bfloat16', 'bfloat16'),
  ],
)
def test_values(key, text, value):
  got = applied((key, text))[key]
  assert got == value
  assert type(got) is type(value)


def test_a_number_without_a_point_in_the_file_becomes_a_float():
  config = base.get_config()
  with config.ignore_type():
    config.optimizer.weight_decay = 0
  value = config_lib.apply(config, []).optimizer.weight_decay
  assert type(value) is float


def test_the_given_config_is_not_changed():
  config = base.get_config()
  config_lib.apply(config, [('seed', '5'), ('moe.router.x', '1')])
  assert config.to_dict() == base.get_config().to_dict()


# What is refused.


@pytest.mark.parametrize(
  'key, text, shown',
  [
    ('seed', '-1', '-1'),
    ('seed', '4294967296', '4294967296'),
    ('seed', '1.5', '1.5'),
    ('seed', 'abc', 'abc'),
    ('seed', '', "''"),
    ('seed', 'true', 'true'),
    ('seed', 'False', 'False'),
    ('seed', 'yes', 'yes'),
    ('seed', 'nan', 'nan'),
    ('seed', 'inf', 'inf'),
    ('seed', '1e400', '1e400'),
    ('seed', '0x10', '0x10'),
    ('num_train_steps', '0', '0'),
    ('num_train_steps', '-5', '-5'),
    ('num_train_steps', '9' * 400, '999'),
    ('num_train_steps', '9' * 5000, '999'),
    ('eval_iters', '-1', '-1'),
    ('checkpoint.keep_latest', '0', '0'),
    ('optimizer.learning_rate', 'nan', 'nan'),
    ('optimizer.learning_rate', 'inf', 'inf'),
    ('optimizer.learning_rate', '-inf', '-inf'),
    ('optimizer.learning_rate', '1e400', 'inf'),
    ('optimizer.learning_rate', '-0.1', '-0.1'),
    ('optimizer.learning_rate', 'fast', 'fast'),
    ('optimizer.learning_rate', 'true', 'true'),
    ('optimizer.learning_rate', '1,5', '1,5'),
    ('optimizer.beta1', '1', '1'),
    ('optimizer.beta2', '-0.1', '-0.1'),
    ('model.dropout_rate', '1.0', '1.0'),
    ('precision', 'float16', 'float16'),
    ('data.fallback', 'none', 'none'),
    ('moe.balance', 'Documented', 'Documented'),
  ],
)
def test_a_bad_value_is_one_line_with_key_and_value(key, text, shown):
  (line,) = mistakes((key, text))
  assert key in line
  assert shown in line.replace(key, '')


def test_a_bad_choice_names_them_all_and_the_nearest():
  (line,) = mistakes(('moe.dispatch', 'droples'))
  for choice in schema.FIELDS['moe.dispatch'].choices:
    assert repr(choice) in line
  assert hint(line) == 'dropless'


@pytest.mark.parametrize(
  'key', [k for k, f in schema.FIELDS.items() if f.low is not None]
)
def test_bounds(key):
  field = schema.FIELDS[key]
  assert applied(*LEAST, (key, repr(field.low)))[key] == field.low
  (line,) = mistakes(*LEAST, (key, repr(field.low - 1)))
  assert key in line
  if field.below is not None:
    (line,) = mistakes(*LEAST, (key, repr(field.below)))
    assert key in line


@pytest.mark.parametrize(
  'key', [k for k, f in schema.FIELDS.items() if f.above is not None]
)
def test_bounds_that_are_excluded(key):
  above = schema.FIELDS[key].above
  assert applied((key, repr(above + 1)))[key] == above + 1
  for value in (above, above - 1):
    (line,) = mistakes((key, repr(value)))
    assert key in line
    assert f'> {above}' in line


@pytest.mark.parametrize(
  'key, value',
  [
    ('optimizer.learning_rate', math.nan),
    ('optimizer.learning_rate', True),
    ('optimizer.learning_rate', '0.1'),
    ('optimizer.learning_rate', None),
    ('optimizer.learning_rate', 10**400),
    ('seed', True),
    ('seed', 1.0),
    ('seed', '1'),
    ('seed', [1]),
    ('data.path', 3),
  ],
  ids=lambda x: repr(x)[:30],
)
def test_a_bad_value_in_a_config_file(key, value):
  values = base.get_config().to_dict()
  *sections, name = key.split('.')
  section = values
  for part in sections:
    section = section[part]
  section[name] = value
  (line,) = mistakes(config=ConfigDict(values))
  assert key in line


@pytest.mark.parametrize('key', schema.FIELDS)
def test_a_missing_key_is_named(key):
  config = base.get_config()
  *sections, name = key.split('.')
  section = config
  for part in sections:
    section = section[part]
  del section[name]
  (line,) = mistakes(config=config)
  assert key in line


def test_values_that_contradict_each_other_name_both_keys():
  experts, heads = mistakes(
    ('moe.top_k', '5'), ('model.d_model', '30'), ('model.num_heads', '4')
  )
  assert 'moe.top_k=5' in experts
  assert 'moe.num_experts=4' in experts
  assert 'model.num_heads=4' in heads
  assert 'model.d_model=30' in heads
  width, kv_heads = mistakes(
    ('model.num_kv_heads', '3'),
    ('model.position', 'rope'),
    ('model.d_model', '12'),
  )
  assert 'model.num_heads=4' in kv_heads
  assert 'model.num_kv_heads=3' in kv_heads
  assert "model.position='rope'" in width
  assert 'model.d_model=12' in width


@pytest.mark.parametrize('key', schema.FIELDS)
def test_a_typo_is_answered_with_the_nearest_key(key):
  section, dot, name = key.rpartition('.')
  typo = f'{section}{dot}{name[0]}{name[2:]}'
  (line,) = mistakes((typo, '1'))
  assert repr(typo) in line
  assert hint(line) == key


def test_the_right_name_in_the_wrong_section_is_answered_with_the_right_one():
  last = [key.rpartition('.')[2] for key in schema.FIELDS]
  assert len(last) == len(set(last))  # Otherwise no answer is the right one.
  sections = {'', *(key.rpartition('.')[0] for key in schema.FIELDS)}
  answers = {}
  for key in schema.FIELDS:
    section, _, name = key.rpartition('.')
    for other in sections - {section}:
      given = f'{other}.{name}' if other else name
      if given in sections:  # Such as `data`, whose keys are then listed.
        continue
      (line,) = mistakes((given, '1'))
      answers[given] = hint(line), key
  assert {g: a for g, a in answers.items() if a[0] != a[1]} == {}


@pytest.mark.parametrize('section', ['', 'model.', 'optimizer.', 'train.'])
@pytest.mark.parametrize('name', validation.SYNONYMS)
def test_a_name_of_another_trainer_is_answered(section, name):
  lines = mistakes((f'{section}{name}', '1'))
  assert hint(lines[0]) == validation.SYNONYMS[name]


def test_every_answer_to_another_trainers_name_is_a_key():
  for key in validation.SYNONYMS.values():
    assert validation.known(key), key


@pytest.mark.parametrize(
  ('signature', 'given', 'expected'),
  [
    ('', '', 5000),
    ('steps="7"', '', 7),
    ('steps="7"', ':9', 9),
    ('steps', ':9', 9),
    ('', ':9', 'takes no argument'),
    ('steps', '', 'needs an argument'),
  ],
)
def test_a_config_file_takes_an_argument(tmp_path, signature, given, expected):
  path = write(
    tmp_path / 'mine.py',
    'from configs import base\n'
    f'def get_config({signature}):\n'
    '  config = base.get_config()\n'
    f'  config.num_train_steps = int({"steps" if signature else 5000})\n'
    '  return config\n',
  )
  if isinstance(expected, int):
    config = config_lib.load_file(f'{path}{given}')
    assert config.num_train_steps == expected
    return
  with pytest.raises(UserError) as error:
    config_lib.load_file(f'{path}{given}')
  assert expected in str(error.value)


@pytest.mark.parametrize('key', ['', '.', 'xyzzy', 'a.b.c.d', 'moe.', 'Ⅷ'])
def test_a_key_like_nothing_else(key):
  (line,) = mistakes((key, '1'))
  assert repr(key) in line


@pytest.mark.parametrize(
  'section',
  [
    'data',
    'moe',
    'moe.router',
    'optimizer',
    'optimizer.schedule',
    'callbacks',
    'callbacks.early_stopping',
  ],
)
def test_a_section_is_no_key_and_its_keys_are_told(section):
  (line,) = mistakes((section, '5'))
  assert section in line
  assert 'section' in line
  assert f'{section}.' in line.replace(f'config.{section}', '')


def test_all_mistakes_are_told_at_once():
  lines = mistakes(
    ('batch_size', '0'),
    ('seed', 'x'),
    ('moe.topk', '2'),
    ('optimizer', '1'),
    ('moe.dispatch', 'denes'),
    ('optimizer.beta1', 'nan'),
  )
  assert len(lines) == 6
  for part in ['batch_size=0', 'seed', 'topk', 'section', 'denes', 'beta1=nan']:
    assert sum(part in line for line in lines) == 1, part
  assert not any('\n' in line for line in lines)


# Specs.


def test_arguments_of_a_spec_that_the_file_does_not_declare():
  values = parsed(
    '--config.optimizer.schedule.type=warmup_cosine',
    '--config.optimizer.schedule.warmup_steps=10',
    '--config.optimizer.schedule.final_fraction',
    '0.5',
    '--config.callbacks.mine.type=my_package.Mine',
  )
  assert values['optimizer.schedule.type'] == 'warmup_cosine'
  assert values['optimizer.schedule.warmup_steps'] == 10
  assert values['optimizer.schedule.final_fraction'] == 0.5
  assert values['callbacks.mine.type'] == 'my_package.Mine'
  assert values['callbacks.non_finite.patience'] == 10


def test_a_spec_s_arguments_may_come_before_its_type():
  argument = '--config.optimizer.schedule.warmup_steps=10'
  kind = '--config.optimizer.schedule.type=wsd'
  assert parsed(argument, kind) == parsed(kind, argument)


def test_another_type_does_not_inherit_arguments():
  values = applied(('callbacks.non_finite.type', 'EarlyStopping'))
  assert values['callbacks.non_finite.type'] == 'EarlyStopping'
  assert 'callbacks.non_finite.patience' not in values
  same = applied(('callbacks.non_finite.type', 'RefusedUpdates'))
  assert same['callbacks.non_finite.patience'] == 10


@pytest.mark.parametrize(
  ('key', 'old', 'new'),
  [
    ('moe.balance', 'documented', 'switch_sum'),
    ('moe.balance', 'mean', 'all_choices'),
    ('moe.balance', 'sequence', 'per_sequence'),
    ('callbacks.non_finite.type', 'StopOnNonFinite', 'RefusedUpdates'),
  ],
)
def test_an_old_name_of_a_value_is_read_and_the_new_one_recorded(
  key, old, new, tmp_path
):
  """An old name is read in an override, a config file and a config.json."""
  assert applied((key, old)) == applied((key, new))
  file = base.get_config()
  file.update_from_flattened_dict({key: old})
  config = config_lib.apply(file, [])
  assert flat(config) == applied((key, new))
  workdir_lib.write_json(tmp_path / 'config.json', file.to_dict())
  recorded = workdir_lib.read_config(tmp_path)
  assert flat(recorded)[key] == new
  assert flat(resume.resume_config(recorded, config, [])) == flat(config)


@pytest.mark.parametrize(('old', 'new'), [(False, 'none'), (True, 'block')])
def test_a_key_that_was_a_boolean_is_read(old, new, tmp_path):
  key = 'model.remat'
  for text in (str(old), str(old).lower(), new):
    assert applied((key, text))[key] == new
  file = base.get_config().to_dict()
  file['model']['remat'] = old
  config = config_lib.apply(schema.make(file), [])
  assert flat(config)[key] == new
  workdir_lib.write_json(tmp_path / 'config.json', file)
  recorded = workdir_lib.read_config(tmp_path)
  assert flat(recorded)[key] == new
  assert flat(resume.resume_config(recorded, config, [])) == flat(config)


def test_a_key_that_an_older_run_lacks_gets_its_value(tmp_path):
  """The older run then resumes without a change."""
  new = decided()
  older = new.to_dict()
  del older['moe']['eval_dispatch'], older['model']['attention']
  del older['accumulate_steps'], older['upcycle']
  for key in ('scan_layers', 'logits_chunk', 'vocab_rows'):
    del older['model'][key]
  workdir_lib.write_json(tmp_path / 'config.json', older)
  recorded = workdir_lib.read_config(tmp_path)
  assert recorded.to_dict() == new.to_dict()
  assert workdir_lib.config_of(tmp_path) == recorded
  assert resume.resume_config(recorded, new, []).to_dict() == new.to_dict()


def test_a_section_that_a_config_lacks_is_still_missing():
  mesh = dict.fromkeys(('data', 'fsdp', 'expert', 'tensor'), 1)
  # Versions lacked all of these.
  new = {'mesh': mesh, 'accumulate_steps': 1, 'upcycle': {'type': ''}}
  assert older.upgrade({'seed': 1}) == {'seed': 1, **new}
  assert older.upgrade({'moe': 3}) == {'moe': 3, **new}


def test_a_choice_does_not_offer_old_names():
  (line,) = mistakes(('moe.balance', 'documentd'))
  assert 'switch_sum' in line
  assert 'documented' not in line


def test_arguments_without_a_type():
  (line,) = mistakes(('callbacks.mine.patience', '3'))
  assert 'callbacks.mine.type' in line


@pytest.mark.parametrize(
  'text, value',
  [
    ('3', 3),
    ('-3', -3),
    ('1e-3', 0.001),
    ('True', True),
    ('None', None),
    ("'3'", '3'),
    ('plain text', 'plain text'),
    ('', ''),
    ('/a/b.txt', '/a/b.txt'),
    ('(1', '(1'),
  ],
)
def test_an_argument_of_a_spec_is_a_literal_or_text(text, value):
  got = applied(('moe.router.x', text))['moe.router.x']
  assert got == value
  assert type(got) is type(value)


@pytest.mark.parametrize(
  'text',
  ['{[]: 1}', '{1}', '...', 'b"x"', '1j', '1e999', '-' * 5000 + '1'],
  ids=lambda text: text[:8],
)
def test_an_argument_that_no_json_can_hold_is_text(text):
  config = config_lib.apply(base.get_config(), [('moe.router.x', text)])
  assert config.moe.router.x == text
  assert json.loads(to_json({'x': config.moe.router.x}))['x'] == text


def test_an_argument_that_is_a_section_is_refused():
  (line,) = mistakes(('moe.router.x', '{"a": 1}'))
  assert 'moe.router.x' in line


def test_a_spec_that_the_file_wrote_as_text():
  config = base.get_config()
  with config.ignore_type():
    config.moe.router = 'TopK'
  for overrides in [[], [('moe.router.type', 'TopK')]]:
    lines = mistakes(*overrides, config=config)
    assert any('moe.router' in line for line in lines)


# Anything at all.

_keys = st.sampled_from(
  [
    *schema.FIELDS,
    'callbacks.early_stopping.patience',
    'moe.router.type',
    'moe.router.x',
    'optimizer.schedule.type',
  ]
)
_words = ['nan', '-inf', '1e999', 'True', 'auto', 'dense', 'None', '[1]', '{}']
_texts = st.one_of(
  st.text(max_size=20),
  st.integers().map(str),
  st.floats().map(repr),
  st.integers(0, 600).map(str),
  st.sampled_from(_words),
)
_odd_keys = st.text(st.sampled_from('.abcdemort_ksi'), max_size=20)


@settings(deadline=None, max_examples=150, derandomize=True, database=None)
@given(st.lists(st.tuples(_keys | _odd_keys, _texts), max_size=4))
@example([('batch_size', '1_0')])
@example([('batch_size', '٣')])
@example([('optimizer.beta1', '-nan')])
@example([('callbacks..type', 'x'), ('callbacks.a.', '1')])
def test_overrides_give_a_sound_config_or_a_user_error(overrides):
  try:
    config = config_lib.apply(base.get_config(), overrides)
  except UserError as error:
    assert error.problems
    assert all(line.strip() for line in error.problems)
    return
  values = flat(config)
  assert validation.problems(config.to_dict()) == []
  for key, field in schema.FIELDS.items():
    value = values[key]
    assert type(value) is field.kind
    if field.kind is not str:
      assert math.isfinite(value)
      assert field.low is None or value >= field.low
      assert field.below is None or value < field.below
      assert field.above is None or value > field.above
    if field.choices:
      assert value in field.choices
  assert values['moe.top_k'] <= values['moe.num_experts']
  assert values['model.d_model'] % values['model.num_heads'] == 0
  kv_heads = values['model.num_kv_heads'] or values['model.num_heads']
  assert values['model.num_heads'] % kv_heads == 0


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(
  st.lists(
    st.one_of(
      st.text(max_size=12),
      st.builds('--config.{}={}'.format, _keys, _texts),
      st.builds('--config.{}'.format, _keys),
    ),
    max_size=5,
  )
)
def test_any_command_line_is_split_or_refused(words):
  try:
    rest, overrides = config_lib.split_arguments(words)
  except UserError:
    assert re.match('--?config[.]', words[-1])
    return
  kept = iter(words)
  assert all(word in kept for word in rest)  # In the same order.
  for key, value in overrides:
    flags = [f'{dash}config.{key}' for dash in ('-', '--')]
    assert any(f'{flag}={value}' in words for flag in flags) or (
      value in words and any(flag in words for flag in flags)
    )


# Config files.


def test_base_has_the_keys_of_the_schema_and_no_others():
  values = flat(base.get_config())
  assert {k for k in values if schema.spec_of(k) is None} == set(schema.FIELDS)
  assert {schema.spec_of(k) for k in values} >= set(schema.SPECS)
  assert validation.problems(base.get_config().to_dict()) == []
  arguments = {k for k in values if k.startswith('callbacks.')}
  described = {k for k in schema.ARGUMENTS if k.startswith('callbacks.')}
  assert {k for k in arguments if not k.endswith('.type')} == described


def test_base_states_no_argument_of_a_router():
  """A config file that changes the type alone would hand it on."""
  stated = {k for k in flat(base.get_config()) if k.startswith('moe.router.')}
  assert stated == {'moe.router.type'}
  values = applied(('moe.router.route_scale', '2.5'))
  assert values == {**parsed(), 'moe.router.route_scale': 2.5}


def write(path, text):
  path.write_text(text)
  return str(path)


def test_a_derived_config_assigns_differences_only(tmp_path):
  path = write(
    tmp_path / 'wide.py',
    'from configs import base\n'
    'def get_config():\n'
    '  config = base.get_config()\n'
    '  config.model.d_model = 256\n'
    '  return config\n',
  )
  config = config_lib.apply(config_lib.load_file(path), [])
  values = flat(config)
  assert values == {**parsed(), 'model.d_model': 256}


@pytest.mark.parametrize(
  'name, text, told',
  [
    ('a.py', 'def get_config(:\n', 'line 1'),
    ('a.py', 'import no_such_module_anywhere\n', 'no_such_module_anywhere'),
    ('a.py', 'x = 1\n', 'get_config'),
    ('a.py', 'def get_config():\n  return {}\n', 'ConfigDict'),
    ('a.py', 'def get_config():\n  pass\n', 'ConfigDict'),
    ('a.txt', 'x = 1\n', '.py'),
  ],
)
def test_a_file_that_is_no_config(tmp_path, name, text, told):
  path = write(tmp_path / name, text)
  with pytest.raises(UserError) as error:
    config_lib.load_file(path)
  (line,) = error.value.problems
  assert path in line
  assert told in line.replace(path, '')
  assert '\n' not in line


def test_a_missing_config_file_is_answered_with_those_that_are_there(tmp_path):
  there = write(tmp_path / 'base.py', '')
  write(tmp_path / '__init__.py', '')
  path = str(tmp_path / 'bas.py')
  with pytest.raises(UserError) as error:
    config_lib.load_file(path)
  (line,) = error.value.problems
  assert path in line
  assert there in line
  assert '__init__' not in line


@pytest.mark.parametrize('path', ['', '.', 'configs', 'a/b.py', 'x' * 300])
def test_a_config_path_that_is_no_file(path):
  with pytest.raises(UserError) as error:
    config_lib.load_file(path)
  assert path in str(error.value)


# A run's own config.


def decided(*overrides):
  """A config as a run wrote it."""
  return config_lib.apply(
    base.get_config(),
    [('precision', 'float32'), ('moe.dispatch', 'dropless'), *overrides],
  )


def test_a_config_comes_back_from_its_file(tmp_path):
  config = decided(('data.path', 'ü\n"\\'), ('moe.router.x', '[1, 2]'))
  workdir_lib.write_json(tmp_path / 'config.json', config.to_dict())
  again = workdir_lib.read_config(tmp_path)
  assert again.to_dict() == config.to_dict()
  assert flat(config_lib.apply(again, [])) == flat(config)


def test_a_directory_without_a_run(tmp_path):
  assert workdir_lib.read_config(tmp_path) is None
  assert workdir_lib.read_config(tmp_path / 'missing') is None
  file = tmp_path / 'file'
  file.touch()
  assert workdir_lib.read_config(file) is None


@pytest.mark.parametrize(
  'raw', [b'', b'{"seed": 1', b'[1]', b'null', b'"x"', b'\xff{}', b'{}']
)
def test_a_damaged_config_is_named(tmp_path, raw):
  (tmp_path / 'config.json').write_bytes(raw)
  with pytest.raises(UserError) as error:
    workdir_lib.read_config(tmp_path)
  (line,) = error.value.problems
  assert str(tmp_path / 'config.json') in line


def test_a_config_that_cannot_be_read_is_named(tmp_path):
  (tmp_path / 'config.json').mkdir()
  with pytest.raises(UserError, match=r'config\.json'):
    workdir_lib.read_config(tmp_path)


def test_what_makes_it_another_run_is_refused_with_both_values():
  with pytest.raises(UserError) as error:
    resume.resume_config(
      decided(),
      decided(
        ('seed', '77'),
        ('moe.num_experts', '9'),
        ('batch_size', '55'),
        ('precision', 'bfloat16'),
        ('num_train_steps', '44'),
      ),
      ['num_train_steps'],
    )
  lines = {line.split()[0]: line for line in error.value.problems}
  both = {
    'seed': ('0', '77'),
    'moe.num_experts': ('4', '9'),
    'batch_size': ('32', '55'),
    'precision': ("'float32'", "'bfloat16'"),
  }
  assert lines.keys() == both.keys()
  for key, (was, now) in both.items():
    assert f'{was} ' in lines[key]
    assert now in lines[key]


@pytest.mark.parametrize(
  'key, text',
  [
    ('num_train_steps', '9000'),
    ('eval_interval', '7'),
    ('eval_iters', '0'),
    ('log_interval', '7'),
    ('moe.aux_weight', '0.5'),
    ('optimizer.learning_rate', '0.01'),
    ('checkpoint.keep_latest', '7'),
    ('callbacks.early_stopping.patience', '7'),
    ('sample.num_tokens', '7'),
    ('data.fallback', ''),
    ('model.logits_chunk', '7'),
    ('model.remat', 'attention'),
  ],
)
def test_what_a_run_may_change(key, text):
  old, new = decided(), decided((key, text))
  got = resume.resume_config(old, new, [key])
  assert flat(got) == applied(
    ('precision', 'float32'), ('moe.dispatch', 'dropless'), (key, text)
  )


@pytest.mark.parametrize(
  'key', ['seed', 'block_size', 'model.num_layers', 'moe.d_ff', 'moe.top_k']
)
def test_what_a_run_may_not_change(key):
  with pytest.raises(UserError, match=rf'^{key} '):
    resume.resume_config(decided(), decided((key, '1')), [key])


def test_what_nobody_asked_for_by_name_is_refused():
  """Another file for an old run: its schedule would be lost without a word."""
  changes = [
    ('optimizer.learning_rate', '0.01'),
    ('optimizer.schedule.type', 'linear'),
    ('optimizer.schedule.warmup_steps', '7'),
  ]
  new = decided(*changes)
  with pytest.raises(UserError) as error:
    resume.resume_config(decided(), new, [])
  lines = {line.split()[0]: line for line in error.value.problems}
  assert lines.keys() == {key for key, _ in changes}
  for key, line in lines.items():
    assert f'--config.{key}' in line
  asked = ['optimizer.learning_rate', 'optimizer.schedule.type']
  assert resume.resume_config(decided(), new, asked) == new


@pytest.mark.parametrize(
  ('key', 'text'),
  [
    ('num_train_steps', '9000'),
    ('confidence_weight', '0.5'),
    ('moe.aux_weight', '0.5'),
    ('moe.z_weight', '0.5'),
    ('moe.entropy_weight', '0.5'),
    ('moe.eval_dispatch', 'dense'),
  ],
)
def test_what_changes_the_end_is_asked_for_by_name(key, text):
  old, new = decided(), decided((key, text))
  with pytest.raises(UserError, match=rf'--config\.{re.escape(key)}'):
    resume.resume_config(old, new, [])
  assert flat(resume.resume_config(old, new, [key])) == flat(new)


def test_an_argument_of_the_router_may_not_appear_or_vanish():
  plain, other = decided(), decided(('moe.router.x', '1'))
  for old, new in [(plain, other), (other, plain)]:
    with pytest.raises(UserError, match=r'moe\.router\.x .*None'):
      resume.resume_config(old, new, ['moe.router.x'])


def test_auto_takes_what_the_run_had_decided():
  old = decided(('precision', 'bfloat16'), ('moe.dispatch', 'dense'))
  new = config_lib.apply(base.get_config(), [])
  assert new.precision == new.moe.dispatch == 'auto'
  got = resume.resume_config(old, new, [])
  assert got.precision == 'bfloat16'
  assert got.moe.dispatch == 'dense'
  assert got.to_dict() == old.to_dict()
  assert new.precision == 'auto'


def test_auto_in_evaluation_takes_what_the_run_had_decided_if_it_had():
  name = 'moe.eval_dispatch'
  new = config_lib.apply(base.get_config(), [(name, 'auto')])
  old = decided((name, 'dense'))
  assert resume.resume_config(old, new, []).moe.eval_dispatch == 'dense'
  got = resume.resume_config(decided(), new, [name])
  assert got.moe.eval_dispatch == 'auto'
  assert experiment.resolve_auto(got).moe.eval_dispatch == 'dropless'


def test_the_command_that_started_a_run_goes_on_with_it(
  tmp_path, monkeypatch, corpus
):
  """A path that was given relative to the same directory is the same path."""
  monkeypatch.chdir(corpus.parent)
  new = config_lib.apply(base.get_config(), [('data.path', corpus.name)])
  old = experiment.resolve_auto(new)
  workdir_lib.write_json(tmp_path / 'config.json', old.to_dict())
  got = resume.resume_config(workdir_lib.read_config(tmp_path), new, [])
  assert experiment.resolve_auto(got).to_dict() == old.to_dict()


def test_changes_are_logged(caplog):
  logger = logging.getLogger('nanomoe.config.resume')
  logger.addHandler(caplog.handler)
  try:
    with caplog.at_level(logging.INFO, logger='nanomoe.config.resume'):
      new = decided(('eval_iters', '17'))
      resume.resume_config(decided(), new, ['eval_iters'])
  finally:
    logger.removeHandler(caplog.handler)
  lines = {record.getMessage() for record in caplog.records}
  assert len(lines) == 1
  assert re.search(r'eval_iters .*200.* 17', lines.pop())


# The directory.


@pytest.fixture
def loggers():
  """The project's loggers, as they were before."""
  found = [logging.getLogger(name) for name in ('nanomoe', 'trainers')]
  before = [(logger.handlers[:], logger.level) for logger in found]
  yield found
  for logger, (handlers, level) in zip(found, before, strict=True):
    for handler in set(logger.handlers) - set(handlers):
      handler.close()
    logger.handlers = handlers
    logger.setLevel(level)


def test_the_log_of_a_run_goes_on(tmp_path, loggers):
  directory = tmp_path / 'new' / 'run'
  directory.mkdir(parents=True)
  (directory / 'log.txt').write_text('before\n')
  workdir_lib.log_to(directory)
  for logger in loggers:
    logger.setLevel(logging.INFO)
    logger.info('from %s, ★', logger.name)
  lines = (directory / 'log.txt').read_text(encoding='utf-8').splitlines()
  assert lines[0] == 'before'
  assert lines[1].endswith('from nanomoe, ★')
  assert lines[2].endswith('from trainers, ★')


def test_a_reader_holds_the_lock_for_a_moment(tmp_path, loggers):
  (tmp_path / 'log.txt').touch()
  reader = (tmp_path / 'log.txt').open()
  fcntl.flock(reader, fcntl.LOCK_SH)  # As `history.is_locked` does.
  timer = threading.Timer(0.05, reader.close)
  timer.start()
  workdir_lib.log_to(tmp_path)
  timer.join()
  assert history.is_locked(tmp_path / 'log.txt')


def test_a_directory_that_cannot_be_made(tmp_path, loggers):
  (tmp_path / 'file').touch()
  for path in [tmp_path / 'file', tmp_path / 'file' / 'run']:
    with pytest.raises(UserError) as error:
      workdir_lib.log_to(path)
    assert str(path) in str(error.value)


def test_default_directories_do_not_collide(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  paths = []
  for _ in range(4):  # More than one of them within a second.
    paths.append(workdir_lib.make_default('some/where/wide.py'))
  assert len(set(paths)) == 4
  assert all(path.is_dir() for path in paths)
  assert all(path.parent.name == 'runs' for path in paths)
  assert all(path.name.startswith('wide-') for path in paths)


def test_what_json_has_no_number_for_is_null(tmp_path):
  path = tmp_path / 'x.json'
  workdir_lib.write_json(path, {'a': [math.nan, math.inf, 1.5], 'b': 'ü'})
  assert json.loads(path.read_text(encoding='utf-8')) == {
    'a': [None, None, 1.5],
    'b': 'ü',
  }
  assert [p.name for p in tmp_path.iterdir()] == ['x.json']


@pytest.mark.parametrize(
  ('factor', 'patience', 'key'),
  [
    (0.5, 10, 'optimizer.spike_factor=0.5'),
    (3.0, 0, 'callbacks.non_finite.patience'),
    (3.0, 10, None),
    (0.0, 0, None),
  ],
)
def test_a_guard_against_spikes_is_one(factor, patience, key):
  config = base.get_config()
  config.optimizer.spike_factor = factor
  config.callbacks.non_finite.patience = patience
  lines = validation.problems(config.to_dict())
  assert [key in line for line in lines] == [True] * (key is not None)
