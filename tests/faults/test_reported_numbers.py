"""Numbers out of range: each flag of each command, each key, each argument."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from faults.conftest import fault
from nanomoe import evaluate, experiment, generate
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema, validation
from nanomoe.moe.routers import ROUTERS
from nanomoe.run import workdir
from nanomoe.sampling import Sampling, draw
from nanomoe.schedules import SCHEDULES
from trainers import spec
from trainers.checkpoint import reader
from trainers.errors import UserError

pytestmark = pytest.mark.reported('10')

ONE_LINE = 'one line that names it and what is allowed, exit code 2'
HUGE = '1' + '0' * 400
BEYOND = '1' + '0' * 5000  # More digits than Python reads.


def case(what, *values, promised=ONE_LINE):
  return pytest.param(*values, marks=fault(what, promised), id=what)


def one_line(call, *args, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  (line,) = error.value.problems
  assert '\n' not in line
  assert len(line) < 400
  return line


# generate.

BAD = {
  'seed': ['-1', '2**32', '2**32+7', '2**63', '2**64', '1.5', 'nan', 'x', ''],
  'top_k': ['-1', '3000000000', '2**63', '1.5', 'nan', '٣', 'None'],
  'num_tokens': ['-1', '2**31', HUGE, BEYOND, 'inf', '1e-3'],
  'temperature': ['-0.1', 'nan', 'inf', '-inf', '1e999', HUGE, '0,8', ''],
  'top_p': ['-0.1', '1.01', 'nan', 'inf', '2', HUGE],
}


PYTHON = {
  'seed': [-1, 2**32, 10**5000, 1.0, None, '٣'],
  'top_k': [-1, 2**31, True, np.int64(-1)],
  'num_tokens': [-1, 10**400, True, '1e-3'],
  'temperature': [-0.1, math.nan, math.inf, 10**400, [0.8], None],
  'top_p': [-0.1, math.nan, np.float32(1.5), 2],
}


def written(text):
  base, _, rest = text.partition('**')
  power, _, more = rest.partition('+')
  return str(int(base) ** int(power) + int(more or 0)) if rest else text


def named(text):
  return f'{len(text)} digits' if len(text) > 20 else text


@pytest.mark.parametrize(
  ('name', 'texts'),
  [
    case(f'generate --{name}= {", ".join(map(named, texts))}', name, texts)
    for name, texts in BAD.items()
  ],
)
def test_a_flag_of_generate(tmp_path, happened, name, texts):
  for text in map(written, texts):
    generate._FLAGS.unparse_flags()
    generate._parse(['generate', f'--workdir={tmp_path}', f'--{name}={text}'])
    line = one_line(generate.main, None)
    assert line.startswith(f'--{name}={validation.shown(text)}: ')
    assert generate.NUMBERS[name][1].allowed in line
  happened(line[:120])


@pytest.mark.parametrize(
  ('name', 'values'),
  [
    case(f'generate({name}=...) in Python, out of range or no number', name, v)
    for name, v in PYTHON.items()
  ],
)
def test_a_number_for_generate_in_python(tmp_path, happened, name, values):
  for value in values:
    line = one_line(generate.checked, **{name: value})
    assert line.startswith(f'--{name}=')
    assert generate.NUMBERS[name][1].allowed in line
  # Before anything of the run is read.
  line = one_line(generate.generate, tmp_path, ['a'], **{name: values[0]})
  assert line.startswith(f'--{name}=')
  happened(line[:120])


@fault(
  'numbers of generate at the ends of their ranges', 'each is what it says'
)
def test_numbers_that_are_allowed(happened):
  given = {'seed': str(2**32 - 1), 'num_tokens': '1e3', 'top_p': np.float64(1)}
  expected = {'seed': 2**32 - 1, 'num_tokens': 1000, 'top_p': 1.0}
  found = generate.checked(**given)
  assert found == expected
  assert [type(v) for v in found.values()] == [int, int, float]
  assert generate.checked(temperature=1, top_k=np.int32(0)) == {
    'temperature': 1.0,
    'top_k': 0,
  }
  defaults = {name: default for name, (default, _) in generate.NUMBERS.items()}
  assert generate.checked(**defaults) == defaults
  parameters = inspect.signature(generate.generate).parameters
  assert {name: parameters[name].default for name in defaults} == defaults
  # The seed of the config has the same range.
  fields = generate.NUMBERS['seed'][1], schema.FIELDS['seed']
  assert fields[0].allowed == fields[1].allowed
  happened('--seed=4294967295, --num_tokens=1e3, --top_p=1')


@fault(
  'temperatures of 1e-320, 1e-40 and 1e-31: float32 cannot divide by them',
  'the likeliest token, as of 0',
)
def test_a_temperature_that_float32_cannot_divide_by(happened):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 9)) * 9)
  key = jax.random.key(0)
  for temperature in (1e-320, 1e-40, 1e-31, 0):
    found = draw(logits, key, Sampling(temperature))
    np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))
  happened('the likeliest, for 64 rows of 9 logits')


# --step.


STEPS = ['-1', '3', '1e1', '٣', '010', '1_0', ' 10', '', 'BEST', HUGE]


@fault(f'--step= {", ".join(map(named, STEPS))}', ONE_LINE)
def test_a_step(tmp_path, happened):
  for name in ('10', '20', '٣'):
    (tmp_path / name).mkdir()
  for step in STEPS:
    line = one_line(reader.read, tmp_path, step)
    assert line.startswith(f'--step={step[:10]}')
    assert '10, 20, best and latest' in line
  happened(line.replace(str(tmp_path), '...')[:120])


@fault('evaluate and generate with a step that is an int', 'it is that step')
def test_a_step_that_is_an_int(tmp_path, monkeypatch, happened):
  asked = []

  def restore(config, directory, step):
    asked.append(step)
    raise UserError('enough')

  monkeypatch.setattr(experiment, 'restore', restore)
  config = config_lib.apply(base.get_config(), [('moe.dispatch', 'dense')])
  workdir.write_json(tmp_path / 'config.json', config.to_dict())
  assert one_line(evaluate.evaluate, tmp_path, 'val', 12) == 'enough'
  assert one_line(generate.generate, tmp_path, ['a'], step=12) == 'enough'
  assert asked == ['12', '12']
  happened('step 12')


# Keys of the config, and arguments.

INTEGERS = [k for k, f in schema.FIELDS.items() if f.kind is int]
FLOATS = [k for k, f in schema.FIELDS.items() if f.kind is float]


WHOLE = ['2147483648', HUGE, BEYOND, 'nan', '1e999', '1.5', '٣', '-2']
REAL = [HUGE, BEYOND, 'nan', '-inf', '1e999', '٣', '½', '0x1p3']


@pytest.mark.parametrize(
  ('keys', 'texts'),
  [
    case(f'every {kind} key of the config= {", ".join(map(named, t))}', keys, t)
    for kind, keys, t in [
      ('integer', INTEGERS, WHOLE),
      ('real', FLOATS, REAL),
    ]
  ],
)
def test_numbers_of_the_config(happened, keys, texts):
  for key in keys:
    for text in texts:
      if (key, text) == ('seed', '2147483648'):
        continue  # It is below 2**32.
      line = one_line(config_lib.apply, base.get_config(), [(key, text)])
      assert line.startswith((f'config.{key}=', f'{key}='))
      assert schema.FIELDS[key].allowed in line
  happened(line[:120])


@fault('config.seed = 10**5000 in a config file', ONE_LINE)
def test_an_integer_that_python_does_not_write(happened):
  config = base.get_config()
  config.seed = 10**5000
  line = one_line(config_lib.apply, config, [])
  assert line.startswith('seed=')
  happened(line[:120])


ARGUMENTS = [
  ('data.tokenizer', 'BPE', 'vocab_size'),
  ('moe.router', 'Sigmoid', 'num_groups'),
  ('moe.router', 'Hash', 'seed'),
  ('moe.router', 'ExpertChoice', 'capacity_factor'),
  ('optimizer', 'Muon', 'muon_beta'),
  ('optimizer.schedule', 'warmup_cosine', 'warmup_steps'),
  ('optimizer.schedule', 'wsd', 'decay_steps'),
  ('callbacks.early_stopping', 'EarlyStopping', 'patience'),
  ('callbacks.routing_alarm', 'RoutingAlarm', 'factor'),
]


@fault(
  'integers of 65 bits, and of 401 digits, for arguments of every kind of part',
  ONE_LINE,
)
def test_arguments(happened):
  """A tokenizer's, a router's, an optimizer's, a schedule's, a callback's."""
  for part, kind, name in ARGUMENTS:
    for text in ('18446744073709551616', HUGE, '-' + HUGE):
      line = one_line(
        config_lib.apply,
        base.get_config(),
        [(f'{part}.type', kind), (f'{part}.{name}', text)],
      )
      assert line.startswith(f'{part}.{name}=')
  happened(line[:120])


@fault('an argument of 5001 digits', ONE_LINE)
def test_an_argument_that_is_no_number(happened):
  given = {'type': 'wsd', 'warmup_steps': BEYOND}
  context = {'learning_rate': 1.0, 'num_train_steps': 10}
  line = one_line(spec.build, 'x', given, SCHEDULES, **context)
  assert line.startswith('x.warmup_steps=')
  happened(line[:120])


@fault('moe.router.type=Hash with seed=-1', ONE_LINE)
def test_the_seed_of_a_hash(happened):
  given = {'type': 'Hash', 'seed': -1, 'vocab_size': 9}
  sizes = {'num_experts': 2, 'top_k': 1, 'balance': 'mean'}
  line = one_line(spec.build, 'moe.router', given, ROUTERS, **sizes)
  assert 'seed=-1' in line
  happened(line[:120])


@fault(
  'integers of 64 bits for the seed of a router and for a plug-in',
  'they are kept',
)
def test_integers_of_64_bits(happened):
  for kind, name in [('Hash', 'seed'), ('my_module.Router', 'anything')]:
    overrides = [
      ('moe.router.type', kind),
      (f'moe.router.{name}', str(2**63)),
    ]
    config = config_lib.apply(base.get_config(), overrides)
    assert config.moe.router[name] == 2**63
  happened('9223372036854775808')
