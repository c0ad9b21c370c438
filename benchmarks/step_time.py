"""python -m benchmarks.step_time

Seconds of a training step of configs/base.py, as it is and with one thing
changed, taken in turn within one process; seconds of starting, each in a
process of its own. On random tokens. Writes benchmarks/results/step_time.json.
"""

import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from absl import flags
import jax
import numpy as np

from benchmarks import products
from configs import base
from nanomoe import command, experiment, optimizers
from nanomoe import config as config_lib
from trainers import step as step_lib
from trainers.state import TrainState

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_integer(
  'steps', 30, 'Timed steps of each variant.', flag_values=_FLAGS
)
_PATH = pathlib.Path(__file__).parent / 'results' / 'step_time.json'

VARIANTS = {
  'base.py': {},
  'float32 products': {'precision': 'float32'},
  'bfloat16 products': {'precision': 'bfloat16'},
  'dense dispatch': {'moe.dispatch': 'dense'},
  'no dropout': {'model.dropout_rate': '0'},
}
VOCAB_SIZE = 65


class Variant:
  """A step function with its state; calling it returns the seconds it took."""

  def __init__(self, changes: dict[str, str]):
    config = config_lib.apply(base.get_config(), list(changes.items()))
    config = experiment.decide(config)
    task = experiment.build_task(config, VOCAB_SIZE)
    optimizer, schedule = optimizers.build(config.optimizer, 5000)
    shape = (config.batch_size, config.block_size + 1)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, shape, np.int32)
    self._batch = jax.device_put(
      {
        'inputs': tokens[:, :-1],
        'targets': tokens[:, 1:],
        'weights': np.ones((shape[0], shape[1] - 1), np.float32),
      }
    )
    self._key = jax.random.key(0)
    self._state = jax.jit(
      lambda key: TrainState.create(*task.init(key, self._batch), optimizer)
    )(self._key)
    step = step_lib.make_train_step(task, optimizer, schedule)
    self.flops = products.count(step, self._state, self._batch, self._key)
    self.precision = config.precision
    self._step = jax.jit(step, donate_argnums=0)

  def __call__(self) -> float:
    start = time.perf_counter()
    self._state, _ = self._step(self._state, self._batch, self._key)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start


def starting() -> dict[str, float]:
  """Seconds to import the command, and from the command to the first step."""
  root = pathlib.Path(__file__).parent.parent
  begin = time.perf_counter()
  subprocess.run(
    [sys.executable, '-c', 'import nanomoe.main'], cwd=root, check=True
  )
  imported = time.perf_counter() - begin
  with tempfile.TemporaryDirectory() as directory:
    text = pathlib.Path(directory) / 'text'
    text.write_text('abcdefgh' * 10_000)
    begin = time.perf_counter()
    process = subprocess.Popen(
      [
        sys.executable,
        '-m',
        'nanomoe.main',
        '--config=configs/base.py',
        f'--workdir={directory}/run',
        f'--config.data.path={text}',
        '--config.num_train_steps=2',
        '--config.log_interval=1',
        '--config.eval_iters=1',
        '--config.sample.num_tokens=0',
      ],
      cwd=root,
      stdout=subprocess.PIPE,
      text=True,
      env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': ''},  # It compiles.
    )
    assert process.stdout
    for line in process.stdout:
      if line.startswith('step'):
        break
    first = time.perf_counter() - begin  # Step 1 is told after step 2 began.
    process.communicate()
  return {'import_sec': imported, 'first_step_sec': first}


def main(_: None) -> int:
  started = [starting() for _ in range(3)]
  variants = {name: Variant(changes) for name, changes in VARIANTS.items()}
  seconds: dict[str, list[float]] = {name: [] for name in variants}
  for i in range(_STEPS.value + 3):
    for name, variant in variants.items():
      took = variant()
      if i >= 3:
        seconds[name].append(took)
  rows = {
    name: {
      'median_sec': statistics.median(values),
      'min_sec': min(values),
      'max_sec': max(values),
      'gflop': variants[name].flops / 1e9,
      'precision': variants[name].precision,
    }
    for name, values in seconds.items()
  }
  figures = {
    'machine': {
      'cpu': _cpu(),
      'num_cpus': os.cpu_count(),
      'python': platform.python_version(),
      'jax': jax.__version__,
    },
    'start': {
      key: statistics.median(s[key] for s in started) for key in started[0]
    },
    'step': rows,
  }
  _PATH.parent.mkdir(exist_ok=True)
  _PATH.write_text(json.dumps(figures, indent=1) + '\n')
  print(table(figures))
  return 0


def table(figures: dict) -> str:
  """Markdown."""
  base_seconds = figures['step']['base.py']['median_sec']
  lines = [
    '| base.py, or with | precision | s a step: median (min to max) '
    '| against base.py | GFLOP of products |',
    '|---|---|---:|---:|---:|',
  ]
  lines += [
    f'| {name} | {row["precision"]} | {row["median_sec"]:.3f} '
    f'({row["min_sec"]:.3f} to {row["max_sec"]:.3f}) '
    f'| {row["median_sec"] / base_seconds:.2f} | {row["gflop"]:.1f} |'
    for name, row in figures['step'].items()
  ]
  start, machine = figures['start'], figures['machine']
  lines += [
    '',
    f'{machine["cpu"]}, {machine["num_cpus"]} cores, jax {machine["jax"]}. '
    f'`import nanomoe.main`: {start["import_sec"]:.2f} s; from the command to '
    f'the end of the first step: {start["first_step_sec"]:.1f} s.',
  ]
  return '\n'.join(lines)


def _cpu() -> str:
  path = pathlib.Path('/proc/cpuinfo')
  if not path.exists():
    return platform.processor()
  names = [x for x in path.read_text().splitlines() if 'model name' in x]
  return names[0].partition(':')[2].strip() if names else platform.processor()


if __name__ == '__main__':
  command.run(
    main, lambda argv: command.parse_flags(argv, _FLAGS, str(__doc__))
  )
