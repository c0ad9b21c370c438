"""What a step needs is told before, and when memory runs out; remat."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment
from nanomoe.run import cli as command_lib
from nanomoe.run import memory_hint as hints
from tests import regression
from trainers.callbacks import Callback
from trainers.errors import UserError
from trainers.runtime import memory as memory_lib
from trainers.runtime.memory import StepMemory


def _gradient(config):
  """(loss, gradient) of a batch as training sees it; bytes of temporaries."""
  task = experiment.build_task(config, 20)
  tokens = np.random.default_rng(0).integers(0, 20, (8, config.block_size + 1))
  batch = {
    'inputs': jnp.asarray(tokens[:, :-1], jnp.int32),
    'targets': jnp.asarray(tokens[:, 1:], jnp.int32),
    'weights': jnp.ones((8, config.block_size), jnp.float32),
  }
  params, state = jax.jit(task.init)(jax.random.key(0), batch)

  def loss(params):
    total, _ = task.loss(params, state, batch, jax.random.key(1), train=True)
    return total.sum / total.weight

  step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
  return step(params), step.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('scan', [False, True])
def test_remat_changes_the_memory_alone(tiny, scan):
  """The same parameters and dropout, hence the same loss and gradient."""
  changes = {'model.num_layers': 3, 'block_size': 256, 'precision': 'float32'}
  changes['moe.every'] = 2  # A dense layer has nothing to report.
  if scan:
    changes |= {'model.num_layers': 4, 'model.scan_layers': True}
  results, sizes = zip(
    *(
      _gradient(
        experiment.resolve_auto(tiny({**changes, 'model.remat': remat}))
      )
      for remat in ('none', 'attention', 'block')
    ),
    strict=True,
  )
  for other in results[1:]:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
      results[0],
      other,
    )
  none, attention, block = sizes
  assert attention < 0.8 * none
  assert block < 0.8 * attention


@pytest.mark.slow
def test_a_step_that_cannot_fit_as_a_process(run, command, tmp_path):
  """Hundreds of gigabytes of attention: a warning, then a line, exit code 2."""
  changes = {'model.d_model': 512, 'model.num_heads': 512, 'block_size': 400}
  changes |= {'batch_size': 400, 'model.num_layers': 1}
  process = run(command(f'--workdir={tmp_path / "run"}', changes=changes))
  assert process.returncode == 2, process.stderr
  warning, error = process.stderr.splitlines()
  assert warning.startswith('it may not fit: a step needs ')
  assert error.startswith('error: out of memory after step 0: a step needs ')
  for word in ('GB are free', 'model.remat=block', 'batch_size='):
    assert word in warning and word in error


class Greedy(Callback):
  def on_train_step_end(self, loop):
    if loop.step == 3:
      jnp.zeros(1 << 45).block_until_ready()


def test_what_runs_out_later_is_told_with_the_figures_of_the_step():
  told = []
  trainer = regression.make_trainer(
    callbacks=[Greedy()], memory_hint=lambda memory: told.append(memory) or 'so'
  )
  with pytest.raises(UserError, match=r'after step 3: a step needs .*; so$'):
    trainer.fit()
  (memory,) = told
  # w, b, and two moments of each, a count; four counters; `rows`: 4 bytes.
  assert memory.state == 4 * (4 + 8 + 1 + 4 + 1)
  assert trainer.status == 'failed'


def test_a_warning_before_the_first_step(monkeypatch, caplog):
  monkeypatch.setattr(memory_lib, '_free_on_host', lambda: 10)
  assert regression.make_trainer(memory_hint=lambda _: 'so').fit() == 'done'
  (line,) = [x.getMessage() for x in caplog.records if x.levelname == 'WARNING']
  assert line.startswith('it may not fit: a step needs') and '; so' in line


@pytest.mark.parametrize(
  'memory, changes, told, untold',
  [
    # A quarter of the batch fits.
    (StepMemory(1, 38, 10), {}, ['batch_size=8', 'remat=block'], ['float32']),
    (StepMemory(1, 38, None), {}, ['batch_size=16'], []),
    (StepMemory(1, 38, 10), {'precision': 'float32'}, ['bfloat16'], []),
    (StepMemory(1, 38, 10), {'model.remat': 'true'}, ['batch_size'], ['remat']),
    (StepMemory(1, 9, 1), {'batch_size': 1}, ['block_size'], ['batch_size']),
    (StepMemory(9, 8, 1), {}, ['d_model', 'num_experts'], ['batch_size']),
  ],
)
def test_hints_go_by_the_figures(tiny, memory, changes, told, untold):
  config = tiny({'batch_size': 32, 'precision': 'bfloat16', **changes})
  text = hints.hint(config, memory)
  assert all(word in text for word in told), text
  assert not any(word in text for word in untold), text


@pytest.mark.parametrize(
  'error', [MemoryError('1 GiB'), RuntimeError('RESOURCE_EXHAUSTED: Out of')]
)
def test_any_command_says_it_in_a_line(capsys, error):
  def main(_):
    raise error

  with pytest.raises(SystemExit) as left:
    command_lib._guarded(main)(None)
  assert left.value.code == 2
  assert capsys.readouterr().err == f'error: out of memory: {error}\n'


@pytest.mark.slow
def test_the_script_that_measures_memory_as_a_process(run):
  words = [sys.executable, '-m', 'benchmarks.memory', '--tiny']
  process = run([*words, '--only=logits_chunk,remat'])
  assert process.returncode == 0, process.stderr
  for name in ('none', 'attention', 'block'):
    assert f"'remat': '{name}'" in process.stdout
  process = run([*words, '--only=other'])
  assert process.returncode == 2
  assert process.stderr.splitlines()[-1].startswith('error: --only=other: ')
