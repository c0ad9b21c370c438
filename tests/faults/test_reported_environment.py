"""Environment variables of JAX and XLA with bad values."""

import os
import sys

import pytest

from faults.conftest import fault

pytestmark = pytest.mark.reported('platforms')

ONE_LINE = 'one line that names it, exit code 2, no directory'


def case(variable, value, *, slow=True):
  return pytest.param(
    variable,
    value,
    marks=[
      fault(f'{variable}={value}', ONE_LINE),
      *([pytest.mark.slow] if slow else []),
    ],
  )


def environment(**values):
  """Without the settings of the tests."""
  names = ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')
  return {k: v for k, v in os.environ.items() if k not in names} | values


@pytest.mark.parametrize(
  ('variable', 'value'),
  [
    case('JAX_PLATFORMS', 'foo', slow=False),
    case('JAX_PLATFORMS', 'foo,cpu'),
    case('JAX_PLATFORMS', 'cuda'),
    case('JAX_PLATFORMS', 'tpu'),
    case('JAX_PLATFORM_NAME', 'foo'),
    case('JAX_DEFAULT_DEVICE', 'foo'),
    case('JAX_NUM_CPU_DEVICES', 'abc'),
    case('JAX_NUM_CPU_DEVICES', '0'),
    case('JAX_ENABLE_X64', 'maybe', slow=False),
    case('JAX_DEFAULT_MATMUL_PRECISION', 'foo'),
    case('JAX_DEFAULT_PRNG_IMPL', 'foo'),
    case('JAX_LOGGING_LEVEL', 'foo'),
    case('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', 'abc'),
    case('JAX_COMPILATION_CACHE_DIR', '/dev/null', slow=False),
    case('XLA_FLAGS', '--xla_foo=1', slow=False),
    case('XLA_FLAGS', 'foo'),
    case('XLA_FLAGS', ' '),
    case('XLA_FLAGS', '/dev/null/flags'),
    case('XLA_FLAGS', '--xla_backend_optimization_level=abc', slow=False),
    case('XLA_FLAGS', '--xla_force_host_platform_device_count=0'),
  ],
)
def test_training(run, command, tmp_path, happened, variable, value):
  workdir = tmp_path / 'run'
  done = run(
    command(f'--workdir={workdir}'), env=environment(**{variable: value})
  )
  assert done.returncode == 2, done.stderr
  (line,) = done.stderr.splitlines()
  assert f'{variable}={value!r}' in line
  assert not workdir.exists()
  happened('one line, exit code 2, no directory')


@pytest.mark.parametrize('name', ['generate', 'evaluate'])
@pytest.mark.parametrize(
  ('variable', 'value'),
  [
    case('JAX_PLATFORMS', 'foo'),
    case('JAX_ENABLE_X64', 'maybe'),
    case('XLA_FLAGS', '--xla_foo=1', slow=False),
  ],
)
def test_what_reads_a_run(run, finished, happened, name, variable, value):
  done = run(
    [sys.executable, '-m', f'nanomoe.{name}', f'--workdir={finished[0]}'],
    env=environment(**{variable: value}),
  )
  assert (done.returncode, done.stdout) == (2, ''), done.stderr
  (line,) = done.stderr.splitlines()
  assert f'{variable}={value!r}' in line
  happened('one line, exit code 2')


@fault('JAX_PLATFORMS=cuda and python -O', ONE_LINE)
@pytest.mark.slow
def test_without_assertions(run, command, tmp_path, happened):
  words = command(f'--workdir={tmp_path / "run"}')
  done = run(
    [words[0], '-O', *words[1:]], env=environment(JAX_PLATFORMS='cuda')
  )
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert "JAX_PLATFORMS='cuda'" in line
  happened('one line, exit code 2')


@fault(
  'good XLA_FLAGS, also from a file', 'they are used: no line, exit code 0'
)
@pytest.mark.slow
def test_good_flags(run, finished, tmp_path, happened):
  (tmp_path / 'flags').write_text('--xla_backend_optimization_level=0\n')
  for flags in (tmp_path / 'flags', '--xla_backend_optimization_level=0'):
    done = run(
      [
        *(sys.executable, '-m', 'nanomoe.generate'),
        *(f'--workdir={finished[0]}', '--num_tokens=3'),
      ],
      env=environment(XLA_FLAGS=str(flags)),
    )
    assert (done.returncode, done.stderr) == (0, '')
  happened('no line, exit code 0')
