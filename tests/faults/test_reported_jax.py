"""Settings of JAX change no numbers, and its debuggers are usable."""

import dataclasses
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import Regression, Rows, bits, host, make_trainer

from faults.conftest import same_end
from nanomoe.moe import RouterInputs, routers
from nanomoe.run import cli as command_lib
from nanomoe.run import jax_settings, provenance
from nanomoe.sampling import Sampling, draw
from tests.runs import At, result_of
from trainers import callbacks
from trainers.errors import UserError
from trainers.runtime import keys
from trainers.step import Spikes

NAN = float('nan')


@pytest.fixture
def settings():
  """settings(name=value, ...) sets JAX up; all of it is undone at the end."""
  before = dict(jax.config.values)

  def update(**values):
    for name, value in values.items():
      jax.config.update(name, value)

  yield update
  for name, value in before.items():
    if jax.config.values[name] != value:
      jax.config.update(name, value)


# Numbers.

OTHER = {
  'jax_enable_x64': True,
  'jax_default_prng_impl': 'rbg',
  'jax_threefry_partitionable': False,
  'jax_random_seed_offset': 5,
  'jax_default_matmul_precision': 'bfloat16',
  'jax_softmax_custom_jvp': True,
  'jax_high_dynamic_range_gumbel': True,
  'jax_numpy_rank_promotion': 'raise',
  'jax_numpy_dtype_promotion': 'strict',
  'jax_transfer_guard': 'disallow',
  'jax_transfer_guard_host_to_device': 'disallow_explicit',
  'jax_no_tracing': True,
  'jax_no_execution': True,
}


def row_of(name: str) -> str:
  return {
    'jax_enable_x64': '5',
    'jax_default_prng_impl': 'prng',
    'jax_threefry_partitionable': 'prng',
    'jax_random_seed_offset': 'prng',
  }.get(name, '6')


@pytest.mark.fault(promised='one line that names it; it is ignored')
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=[
        pytest.mark.reported(row_of(name)),
        pytest.mark.fault(injected=f'{name.upper()}={value}'),
      ],
    )
    for name, value in OTHER.items()
  ],
)
def test_a_setting_is_ignored(settings, warnings, happened, name):
  expected = jax.config.values[name]
  settings(**{name: OTHER[name]})
  jax_settings.pin()
  assert jax.config.values[name] in (expected, expected or 'allow')
  (line,) = warnings()
  assert f'{name.upper()}={OTHER[name]}' in line
  jax_settings.pin()
  assert warnings() == [line]
  happened('one line; JAX has its default')


@pytest.mark.reported('5')
@pytest.mark.fault(
  injected='defaults of JAX, checks that only log, and debuggers',
  promised='nothing is logged',
)
def test_settings_that_are_harmless(settings, warnings, happened):
  settings(
    jax_numpy_rank_promotion='warn',
    jax_transfer_guard_host_to_device='log',
    jax_debug_nans=True,
    jax_debug_infs=True,
  )
  jax_settings.pin()
  assert warnings() == []
  assert jax.config.values['jax_debug_nans']
  happened('nothing was logged')


@pytest.mark.reported('5')
@pytest.mark.fault(
  injected='a model built within `with jax.enable_x64(True)`',
  promised='one line that names the setting',
)
def test_a_setting_that_a_context_holds(happened):
  with (
    jax.enable_x64(True),
    pytest.raises(UserError, match='JAX_ENABLE_X64=True: ') as error,
  ):
    jax_settings.pin()
  assert len(error.value.problems) == 1
  happened('one line')


def run_of(workdir, *extra, **changes):
  """A trainer of all that draws, counts and averages."""
  workdir.mkdir(exist_ok=True)
  return make_trainer(
    workdir,
    **{
      'task': Regression(noise=0.1),
      'ema_decay': 0.9,
      'spikes': Spikes(50.0, 3),
      'callbacks': [
        callbacks.Evaluation(4, 'mse'),
        *extra,
        callbacks.Checkpoints(4),
      ],
      **changes,
    },
  )


@pytest.mark.slow
@pytest.mark.reported('prng')
@pytest.mark.fault(
  injected='other random numbers by JAX_DEFAULT_PRNG_IMPL and the like',
  promised='parameters and noise are bitwise the same',
)
@pytest.mark.parametrize(
  'changes',
  [
    {'jax_default_prng_impl': 'rbg'},
    {'jax_threefry_partitionable': False},
    {'jax_random_seed_offset': 5},
  ],
)
def test_a_trainer_draws_the_same(tmp_path, settings, happened, changes):
  expected = run_of(tmp_path / 'expected')
  assert expected.fit() == 'done'
  settings(**changes)
  found = run_of(tmp_path / 'found')
  assert found.fit() == 'done'
  assert bits(host(found.state)) == bits(host(expected.state))
  happened('bitwise the same')


@pytest.mark.reported('prng')
@pytest.mark.fault(
  injected='the seeds 0, 7, -1 and 2**32 - 1',
  promised='their keys are those of older versions',
)
def test_keys_are_those_of_older_versions(happened):
  for seed in (0, 7, -1, 2**32 - 1):
    found, expected = keys.make(seed), jax.random.key(seed)
    assert found.dtype == expected.dtype
    assert bits(jax.random.key_data(found)) == bits(
      jax.random.key_data(expected)
    )
  happened('bitwise the same')


@pytest.mark.reported('prng')
@pytest.mark.fault(
  injected='a run with JAX_DEFAULT_MATMUL_PRECISION or XLA_FLAGS set',
  promised='result.json records what is set',
)
def test_the_environment_is_recorded(monkeypatch, happened):
  values = {
    'JAX_DEFAULT_MATMUL_PRECISION': 'float32',
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  for name, value in values.items():
    monkeypatch.setenv(name, value)
  found = provenance.facts()['environment']
  assert values.items() <= found.items()
  assert not any('CACHE' in name for name in found)
  happened('both are recorded')


# JAX_ENABLE_X64.


@pytest.mark.reported('5')
@pytest.mark.fault(
  injected="a script's own trainer under JAX_ENABLE_X64, resumed under it",
  promised='the end of a run that was not interrupted, in the same types',
)
def test_a_trainer_of_64_bits(tmp_path, settings, happened):
  settings(jax_enable_x64=True)
  expected = run_of(tmp_path / 'expected')
  assert expected.fit() == 'done'
  stop = At(lambda loop: loop.stop('enough'), 6)
  assert run_of(tmp_path / 'found', stop).fit() == 'done'
  found = run_of(tmp_path / 'found')
  assert found.fit() == 'done'
  assert bits(host(found.state)) == bits(host(expected.state))
  assert found.state.params['b'].dtype == np.float64
  assert found.state.average['b'].dtype == np.float64
  assert found.state.recent_losses.dtype == np.float32
  happened('bitwise the same')


@pytest.mark.reported('5')
@pytest.mark.fault(
  injected='a run of 32 bits resumed with 64, and the other way round',
  promised='refused: the types, and JAX_ENABLE_X64, are named',
)
@pytest.mark.parametrize('first', [False, True])
def test_a_run_of_other_bits(tmp_path, settings, happened, first):
  settings(jax_enable_x64=first)
  assert run_of(tmp_path).fit() == 'done'
  settings(jax_enable_x64=not first)
  with pytest.raises(UserError) as error:
    run_of(tmp_path, num_train_steps=12).fit()
  text = str(error.value)
  assert 'float64' in text and 'float32' in text and 'JAX_ENABLE_X64' in text
  assert (tmp_path / 'checkpoints/11').is_dir()  # It is not damaged.
  happened('refused; the checkpoint is kept')


# JAX_DEBUG_NANS.


class Log(Regression):
  """A regression whose loss is not finite where a target is -100 or less."""

  def loss(self, params, model_state, batch, key, *, train):
    total, aux = super().loss(params, model_state, batch, key, train=train)
    if train:
      rows = jnp.log(batch['y'] + 100)  # The line of the NaN.
      bad = jnp.where(jnp.abs(rows) < 1000, 0, rows)
      total = total._replace(sum=total.sum + bad.sum())
    return total, aux


def line_of_the_nan() -> int:
  lines = pathlib.Path(__file__).read_text().splitlines()
  return 1 + next(i for i, x in enumerate(lines) if 'jnp.log(batch' in x)


@pytest.mark.slow
@pytest.mark.reported('6')
@pytest.mark.fault(
  promised='the run, its restart and its spikes are bitwise as without'
)
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.fault(injected=f'{name.upper()}=1'))
    for name in ('jax_debug_nans', 'jax_debug_infs')
  ],
)
def test_a_sound_run(tmp_path, settings, happened, name):
  dataset = Rows({9: 1e6})
  expected = run_of(tmp_path / 'expected', dataset=dataset)
  assert expected.fit() == 'done'
  assert int(expected.state.skipped) == 1
  settings(**{name: True})
  stop = At(lambda loop: loop.stop('enough'), 6)
  assert run_of(tmp_path / 'found', stop, dataset=dataset).fit() == 'done'
  found = run_of(tmp_path / 'found', dataset=dataset)
  assert found.fit() == 'done'
  assert bits(host(found.state)) == bits(host(expected.state))
  happened('bitwise the same; one spike was refused')


@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='a NaN in the loss under JAX_DEBUG_NANS, an infinity under ..._INFS',
  promised='the run stops: its step, the operation, file and line; exit code 3',
)
@pytest.mark.parametrize(
  ('name', 'value', 'kind'),
  [('jax_debug_nans', -1e3, 'nan'), ('jax_debug_infs', -100.0, 'inf')],
)
def test_a_nan_is_found(
  tmp_path, settings, capsys, happened, name, value, kind
):
  settings(**{name: True})
  trainer = run_of(tmp_path, task=Log(), dataset=Rows({5: value}))
  with pytest.raises(FloatingPointError) as error:
    trainer.fit()
  text = str(error.value)
  assert text.startswith(f'{name.upper()}: after step 5: ')
  assert f'({kind}) encountered in log' in text
  assert f'{pathlib.Path(__file__).name}:{line_of_the_nan()} in loss' in text
  assert trainer.status == 'failed'

  def fail(_):
    raise error.value

  capsys.readouterr()
  with pytest.raises(SystemExit) as left:
    command_lib._guarded(fail)(None)
  assert left.value.code == 3
  assert capsys.readouterr().err == f'error: {text}\n'
  happened('step, operation, file and line; exit code 3')


@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='a NaN in an evaluation, outside of any trainer',
  promised='a line with the operation and its place; exit code 3',
)
def test_a_nan_outside_of_a_trainer(settings, capsys, happened):
  settings(jax_debug_nans=True)

  def fail(_):
    return jax.jit(lambda x: jnp.log(x) + 1)(-1.0)

  with pytest.raises(SystemExit) as left:
    command_lib._guarded(fail)(None)
  assert left.value.code == 3
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: JAX_DEBUG_NANS: ') and 'in log, at ' in line
  happened('one line, exit code 3')


@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='a FloatingPointError that JAX was not asked for',
  promised='a bug, with its traceback',
)
def test_another_floating_point_error(happened):
  def fail(_):
    with np.errstate(divide='raise'):
      return np.float64(1) / np.float64(0)

  with pytest.raises(FloatingPointError):
    command_lib._guarded(fail)(None)
  happened('raised unchanged')


def with_old_marks(state):
  """As versions before had it: NaN where there was no loss yet."""
  recent = np.array(state.recent_losses)
  recent[: max(len(recent) - int(state.step - state.skipped), 0)] = np.nan
  return dataclasses.replace(state, recent_losses=jnp.asarray(recent))


@pytest.mark.slow
@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='a checkpoint of an older version: NaN in its window of losses',
  promised='it is resumed bitwise, also under JAX_DEBUG_NANS',
)
@pytest.mark.parametrize('debugged', [False, True])
def test_an_older_checkpoint(tmp_path, settings, happened, debugged):
  window = {'spikes': Spikes(50.0, 6), 'dataset': Rows({2: 1e6, 9: 1e6})}
  expected = run_of(tmp_path / 'expected', **window)
  assert expected.fit() == 'done'
  assert int(expected.state.skipped) == 1  # Of two: the first came too early.
  old = At(lambda loop: loop.update_state(with_old_marks), 4)
  stop = At(lambda loop: loop.stop('enough'), 4)
  first = run_of(tmp_path / 'found', old, stop, **window)
  assert first.fit() == 'done'
  assert np.isnan(np.asarray(first.state.recent_losses)).sum() == 2
  settings(jax_debug_nans=debugged)
  found = run_of(tmp_path / 'found', **window)
  assert found.fit() == 'done'
  assert bits(host(found.state)) == bits(host(expected.state))
  happened('bitwise the same')


@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='a run that refused a NaN, resumed under JAX_DEBUG_NANS',
  promised='the refused NaN is not reported again',
)
def test_a_refused_nan_is_not_found_again(tmp_path, settings, happened):
  changes = {'dataset': Rows({3: NAN}), 'log_interval': 11}
  stop = At(lambda loop: loop.stop('enough'), 4)
  assert run_of(tmp_path, stop, **changes).fit() == 'done'
  settings(jax_debug_nans=True)
  trainer = run_of(tmp_path, **changes)
  assert trainer.fit() == 'done'
  assert int(trainer.state.skipped) == 1
  happened('the run ended')


@pytest.mark.slow
@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='masks of attention, groups and sampling, without jit',
  promised='JAX_DEBUG_INFS and JAX_DEBUG_NANS do not report them',
)
@pytest.mark.parametrize(
  'sampling',
  [Sampling(), Sampling(0.0), Sampling(0.7, 2), Sampling(1.0, 0, 0.5)],
)
def test_masks_are_not_reported(settings, happened, sampling):
  logits = jax.random.normal(jax.random.key(0), (3, 8))
  router = routers.Sigmoid(8, 2, 'all_choices', num_groups=4, groups_kept=2)
  x = jax.random.normal(jax.random.key(1), (1, 3, 4))
  tokens = jnp.zeros((1, 3), jnp.int32)
  settings(jax_debug_nans=True, jax_debug_infs=True)
  with jax.disable_jit():
    draw(logits, keys.make(0), sampling)
    inputs = RouterInputs(tokens, tokens == 0)
    router.init_with_output(keys.make(0), x, inputs, train=False)
  happened('nothing was reported')


# JAX_DISABLE_JIT.


@pytest.mark.slow
@pytest.mark.reported('15')
@pytest.mark.fault(
  injected='JAX_DISABLE_JIT=1, alone and with JAX_DEBUG_NANS=1',
  promised='a run trains, is interrupted and resumed, to the same losses',
)
@pytest.mark.parametrize(
  'debugged', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_a_run_that_is_not_compiled(tmp_path, settings, happened, debugged):
  expected = run_of(tmp_path / 'expected')
  assert expected.fit() == 'done'
  settings(jax_disable_jit=True, jax_debug_nans=debugged)
  steps = []

  class Seen(Regression):
    def loss(self, *args, train, **kwargs):
      steps.append(train)  # Python runs at each step, as a debugger wants.
      return super().loss(*args, train=train, **kwargs)

  stop = At(lambda loop: loop.stop('enough'), 6)
  task = Seen(noise=0.1)
  assert run_of(tmp_path / 'found', stop, task=task).fit() == 'done'
  found = run_of(tmp_path / 'found', task=task)
  assert found.fit() == 'done'
  assert sum(steps) >= found.num_train_steps
  assert found.score and expected.score
  np.testing.assert_allclose(found.score.value, expected.score.value, rtol=1e-5)
  happened('the same losses, to 1e-5')


@pytest.mark.reported('15')
@pytest.mark.fault(
  injected='JAX_DISABLE_JIT=1', promised='one line says that it is slow'
)
def test_a_line_about_the_speed(settings, warnings, happened):
  settings(jax_disable_jit=True)
  jax_settings.pin()
  (line,) = warnings()
  assert 'JAX_DISABLE_JIT' in line
  happened('one line')


# Processes.

# A router with a NaN in its scores.
PLUG_IN = """
import jax.numpy as jnp
from nanomoe.moe.routers import TopK

class Router(TopK):
  def scores(self, x, *args, **kwargs):
    scores = super().scores(x, *args, **kwargs)
    return scores + 0 * jnp.log(scores - 1e6)
"""


def words(module: str, *arguments: str) -> list[str]:
  return [sys.executable, '-m', f'nanomoe.{module}', *arguments]


@pytest.mark.slow
@pytest.mark.reported('5')
@pytest.mark.fault(
  injected='a run resumed, evaluated and sampled under JAX_ENABLE_X64=1',
  promised='bitwise as without it; one line names the flag',
)
def test_the_commands_under_x64(start, run, finished, tmp_path, happened):
  workdir = tmp_path / 'run'
  first = start(workdir, changes={'num_train_steps': 8})
  assert first.end() == 0, first.output[-2000:]
  env = {'JAX_ENABLE_X64': '1'}
  second = start(workdir, '--config.num_train_steps=12', new=False, env=env)
  assert second.end() == 0, second.output[-2000:]
  assert second.output.count('JAX_ENABLE_X64=True') == 1
  same_end(workdir, finished[0])
  path = f'--workdir={finished[0]}'
  for command in ('evaluate', 'generate'):
    found, expected = (
      run(words(command, path), env={**os.environ, **more})
      for more in (env, {})
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr.count('JAX_ENABLE_X64=True') == 1
    assert numbers(found.stdout) == numbers(expected.stdout)
  happened('bitwise the same; each command says so once')


def numbers(text: str):
  """A text, or JSON without the speed."""
  try:
    return {k: v for k, v in json.loads(text).items() if 'sec' not in k}
  except ValueError:
    return text


@pytest.mark.slow
@pytest.mark.reported('6')
@pytest.mark.fault(
  injected='a whole run under JAX_DEBUG_NANS=1 and JAX_DEBUG_INFS=1',
  promised='it trains, evaluates, samples and resumes to the same end',
)
def test_the_commands_under_debug_nans(start, finished, tmp_path, happened):
  workdir = tmp_path / 'run'
  env = {'JAX_DEBUG_NANS': '1', 'JAX_DEBUG_INFS': '1'}
  first = start(workdir, changes={'num_train_steps': 8}, env=env)
  assert first.end() == 0, first.output[-2000:]
  second = start(workdir, '--config.num_train_steps=12', new=False, env=env)
  assert second.end() == 0, second.output[-2000:]
  # JAX donates no buffers in this mode, so XLA may fuse operations in another
  # way: on some processors, the last bits differ.
  same_end(workdir, finished[0], tolerance=1e-4)
  happened('metrics, text and result are the same')


@pytest.mark.slow
@pytest.mark.reported('6')
@pytest.mark.fault(
  injected="a NaN in a plug-in's router under JAX_DEBUG_NANS=1",
  promised='one line with the operation, file and line; exit code 3',
)
def test_a_nan_of_a_plug_in(start, tmp_path, happened):
  (tmp_path / 'with_a_nan.py').write_text(PLUG_IN)
  workdir = tmp_path / 'run'
  process = start(
    workdir,
    changes={'moe.router.type': 'with_a_nan.Router'},
    env={'PYTHONPATH': str(tmp_path), 'JAX_DEBUG_NANS': '1'},
  )
  assert process.end() == 3, process.output[-2000:]
  last = process.output.splitlines()[-1]
  assert last.startswith('error: JAX_DEBUG_NANS: after step 0: ')
  assert 'encountered in log, at ' in last and 'with_a_nan.py:8 in' in last
  assert 'Traceback' not in process.output
  assert result_of(workdir)['status'] == 'failed'
  happened('one line; exit code 3')


@pytest.mark.slow
@pytest.mark.reported('15')
@pytest.mark.fault(
  injected='a whole run under JAX_DISABLE_JIT=1',
  promised='it trains, evaluates and samples, with one line on the speed',
)
def test_the_command_without_jit(start, tmp_path, happened):
  changes = {
    'num_train_steps': 2,
    'eval_interval': 2,
    'eval_iters': 1,
    'log_interval': 1,
    'model.num_layers': 1,
    'sample.num_tokens': 2,
  }
  workdir = tmp_path / 'run'
  env = {'JAX_DISABLE_JIT': '1'}
  process = start(workdir, changes=changes, env=env)
  assert process.end(900) == 0, process.output[-2000:]
  assert process.output.count('JAX_DISABLE_JIT=True') == 1
  assert result_of(workdir)['status'] == 'done'
  assert (workdir / 'sample.txt').exists()
  happened('done, with a sample')
