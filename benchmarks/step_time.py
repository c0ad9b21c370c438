"""python -m benchmarks.step_time [--against=PEER]

Seconds of a training step of configs/base.py, as it is and with one thing
changed, taken in turn within one process; seconds of starting, each in a
process of its own. With a peer: seconds of its step and of its evaluation
batch, block by block in turn with ours, and the memory that a short run holds.
With transformers: steps of Mixtral and Qwen3-MoE at nano scale. On random
tokens. Writes benchmarks/results/step_time[-PEER].json.
"""

import functools
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags
import numpy as np

from benchmarks import peers, results
from benchmarks.variant import VOCAB_SIZE, Variant
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_integer(
  'steps', 30, 'Timed steps of each.', lower_bound=2, flag_values=_FLAGS
)
_AGAINST = flags.DEFINE_enum(
  'against', None, list(peers.PEERS), 'A peer.', flag_values=_FLAGS
)

VARIANTS = {
  'base.py': {},
  'float32 products': {'precision': 'float32'},
  'bfloat16 products': {'precision': 'bfloat16'},
  'dense dispatch': {'moe.dispatch': 'dense'},
  'no dropout': {'model.dropout_rate': '0'},
}
_BLOCK = 3  # Steps that one side takes before it is the other's turn.


def alone() -> dict[str, Any]:
  """Steps of the variants, and starts."""
  started = [starting() for _ in range(3)]
  variants = {name: Variant(changes) for name, changes in VARIANTS.items()}
  seconds: dict[str, list[float]] = {name: [] for name in variants}
  for i in range(_STEPS.value + 3):
    for name, variant in variants.items():
      took = variant()
      if i >= 3:
        seconds[name].append(took)
  return {
    'start': {
      key: statistics.median(s[key] for s in started) for key in started[0]
    },
    'step': {
      name: {
        **peers.summary(values),
        'gflop': variants[name].flops() / 1e9,
        'precision': variants[name].config.precision,
      }
      for name, values in seconds.items()
    },
  }


def starting() -> dict[str, float]:
  """Seconds to import the command, and from the command to the first step."""
  begin = time.perf_counter()
  subprocess.run(
    [sys.executable, '-c', 'import nanomoe.main'], cwd=peers.ROOT, check=True
  )
  imported = time.perf_counter() - begin
  with tempfile.TemporaryDirectory() as directory:
    first = _to_first_step(directory)
    second = _to_first_step(directory)
  return {
    'import_sec': imported,
    'first_step_sec': first,
    'second_start_sec': second,
  }


def _to_first_step(directory: str) -> float:
  """Seconds, of a command whose programs are kept in `directory`."""
  begin = time.perf_counter()
  process = subprocess.Popen(
    [*_main_job(directory, 2), '--config.log_interval=1'],
    cwd=peers.ROOT,
    stdout=subprocess.PIPE,
    text=True,
    env={
      **os.environ,
      'JAX_COMPILATION_CACHE_DIR': f'{directory}/programs',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    },
  )
  assert process.stdout
  for line in process.stdout:
    if line.startswith('step'):
      break
  seconds = time.perf_counter() - begin  # Step 1 is told after step 2 began.
  process.communicate()
  shutil.rmtree(f'{directory}/run')
  return seconds


def _main_job(directory: str, num_steps: int) -> list[str]:
  """A short run on a text of Tiny Shakespeare's size, evaluated twice."""
  return [
    sys.executable,
    '-m',
    'nanomoe.main',
    '--config=configs/base.py',
    f'--workdir={directory}/run',
    f'--config.data.path={_text(directory)}',
    f'--config.num_train_steps={num_steps}',
    '--config.eval_iters=5',
    '--config.sample.num_tokens=0',
  ]


def _text(directory: str) -> pathlib.Path:
  path = pathlib.Path(directory) / 'text'
  codes = np.random.default_rng(0).integers(32, 32 + VOCAB_SIZE, 1_115_394)
  path.write_bytes(codes.astype(np.uint8).tobytes())
  return path


def against(peer: str) -> dict[str, Any]:
  """{what: {'ours': ..., peer: ...}}; memory in bytes."""
  with peers.Worker('ours') as ours, peers.Worker(peer) as theirs:
    both = {'ours': ours, peer: theirs}
    blocks = -(-_STEPS.value // _BLOCK)
    if peer == 'transformers':
      return _transformers(ours, theirs, blocks)
    figures: dict[str, Any] = {
      'step': _interleave(both, 'step', blocks=blocks, n=_BLOCK),
      'evaluation': _interleave(both, 'evaluation', blocks=blocks, n=5),
    }
    if peer == 'torch-dense':
      figures['step_float32'] = _interleave(
        both, 'step_float32', blocks=blocks, n=_BLOCK
      )
  if peer == 'nano-moe-jax':
    with tempfile.TemporaryDirectory() as directory:
      job = _main_job(directory, 20)
      training = [*peers.words(peer), str(_text(directory))]
      figures['peak_memory_bytes'] = {
        'ours': peers.peak_memory(job, ours=True),
        peer: peers.peak_memory(training, ours=False),
      }
  return figures


def _interleave(
  workers: dict[str, peers.Worker], what: str, *, blocks: int, n: int
) -> dict[str, dict[str, Any]]:
  timers = {k: functools.partial(w, what) for k, w in workers.items()}
  return peers.interleave(timers, blocks=blocks, n=n)


def _transformers(
  ours: peers.Worker, theirs: peers.Worker, blocks: int
) -> dict[str, Any]:
  """Times Mixtral and Qwen3-MoE, where the library has its faster precision."""
  figures = {}
  for model in ('mixtral', 'qwen3_moe'):
    rows = peers.interleave(
      {
        'ours': functools.partial(ours, model),
        'float32': functools.partial(theirs, model),
        'bfloat16': functools.partial(theirs, f'{model}_bfloat16'),
      },
      blocks=blocks,
      n=_BLOCK,
    )
    precision = min(
      ('float32', 'bfloat16'), key=lambda name: rows[name]['median_sec']
    )
    figures[f'step_{model}'] = {
      'ours': rows['ours'],
      'transformers': {**rows[precision], 'precision': precision},
    }
  return figures


def table(figures: dict[str, Any]) -> str:
  """Markdown, of the variants."""
  base_seconds = figures['step']['base.py']['median_sec']
  lines = [
    '| variant of base.py | precision | s per step: median (quartiles) '
    '| relative to base.py | GFLOP of products |',
    '|---|---|---:|---:|---:|',
  ]
  lines += [
    f'| {name} | {row["precision"]} | {seconds(row)} '
    f'| {row["median_sec"] / base_seconds:.2f} | {row["gflop"]:.1f} |'
    for name, row in figures['step'].items()
  ]
  start = figures['start']
  lines += [
    '',
    f'{results.describe(figures["machine"])} '
    f'`import nanomoe.main` takes {start["import_sec"]:.2f} s. From the '
    'command to the end of the first step it takes '
    f'{start["first_step_sec"]:.1f} s, or {start["second_start_sec"]:.1f} s '
    'with a warm compilation cache.',
  ]
  return '\n'.join(lines)


def seconds(row: dict[str, Any]) -> str:
  low, high = row['quartiles_sec']
  return f'{row["median_sec"]:.3f} ({low:.3f} to {high:.3f})'


def peer_rows(peer: str, figures: dict[str, Any]) -> list[str]:
  """Returns rows: measurement, peer, NanoMoE, peer, peer / NanoMoE."""
  rows = []
  for what, label in [
    ('step', 'training step, s'),
    ('step_float32', 'training step, both in float32, s'),
    ('step_mixtral', 'training step of Mixtral nano, s'),
    ('step_qwen3_moe', 'training step of Qwen3-MoE nano, s'),
    ('evaluation', 'evaluation batch, s'),
  ]:
    if what not in figures:
      continue
    ours, theirs = figures[what]['ours'], figures[what][peer]
    ratio = theirs['median_sec'] / ours['median_sec']
    rows.append(
      f'| {label} | {peer} | {seconds(ours)} | {seconds(theirs)} '
      f'| {ratio:.2f} |'
    )
  if memory := figures.get('peak_memory_bytes'):
    ours, theirs = memory['ours'], memory[peer]
    rows.append(
      f'| peak memory of training, GB | {peer} | {ours / 1e9:.2f} '
      f'| {theirs / 1e9:.2f} | {theirs / ours:.2f} |'
    )
  return rows


def main(_: None) -> int:
  peer = _AGAINST.value
  if peer:
    name = f'step_time-{peer}'
    results.write(name, against(peer))
    print('\n'.join(peer_rows(peer, results.read(name) or {})))
  else:
    results.write('step_time', alone())
    print(table(results.read('step_time') or {}))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
