"""python -m benchmarks.gpu [--out=DIR] [--only=train,parity] [--tiny]

Measures one GPU in under 9 minutes, compilation included. The parts are:
  train   configs/gpu_300m.py on random tokens: tokens/s, MFU, memory
  parity  every dispatch beside the dense one: outputs and gradients
  layers  seconds of a layer of 32 experts, for every dispatch
  base    seconds of a step of configs/base.py, for every dispatch
Each part is a process with a time limit, so that no failure ends another part.
Rows are written to DIR/gpu.json as they are measured. --tiny runs small sizes
on any device, writes DIR/gpu_tiny.json, and says nothing about GPUs.
"""

from collections.abc import Callable, Iterator
import functools
import pathlib
import subprocess
import sys
import time
import traceback
from typing import Any

from absl import flags
import jax
import numpy as np

from benchmarks import gpu_layers, peers, results, variant
from configs import base, gpu_300m
from nanomoe.config import overrides as config_lib
from nanomoe.model import parameters
from nanomoe.run import cli, jax_settings
from trainers.errors import UserError

_FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string(
  'out', str(results.DIRECTORY), 'Directory of the JSON.', flag_values=_FLAGS
)
_TINY = flags.DEFINE_bool(
  'tiny', False, 'Small sizes, which run on a CPU.', flag_values=_FLAGS
)
_PEAK_FLOPS = flags.DEFINE_float(
  'peak_flops',
  989e12,
  'Peak of dense bfloat16 products, FLOP/s. The default is that of an H200.',
  flag_values=_FLAGS,
)
_STEPS = flags.DEFINE_integer(
  'steps', 50, 'Timed steps or calls.', lower_bound=2, flag_values=_FLAGS
)
_ONLY = flags.DEFINE_list(
  'only', [], 'Parts to measure; all by default.', flag_values=_FLAGS
)
_PART = flags.DEFINE_string(
  'part', '', 'Part that this process measures.', flag_values=_FLAGS
)
_SECONDS = flags.DEFINE_float(
  'seconds', 600.0, 'Time limit of --part, in seconds.', flag_values=_FLAGS
)

# Seconds of each part; time that a part leaves over goes to the later ones.
LIMITS = {'train': 170, 'parity': 110, 'layers': 130, 'base': 90}
NUM_TOKENS = 50_257
SMALL = {
  'batch_size': '2',
  'block_size': '16',
  'model.d_model': '16',
  'model.num_layers': '2',
  'model.num_heads': '2',
  'model.num_kv_heads': '1',
  'model.vocab_rows': '0',
  'moe.d_ff': '16',
}
# Without recomputation, and with the products of chosen experts alone.
ACTIVE = {'model.remat': 'none', 'model.logits_chunk': '0'}
ACTIVE |= {'moe.dispatch': 'grouped', 'precision': 'bfloat16'}

# Name of a row, and a function that measures it.
Rows = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def train() -> Rows:
  """Yields rows of steps of configs/gpu_300m.py, the config's own first."""
  vocab_size, changes = NUM_TOKENS, {}
  if _TINY.value:
    vocab_size, changes = variant.VOCAB_SIZE, SMALL

  @functools.cache
  def active_flops():
    config = config_lib.apply(
      gpu_300m.get_config(), [*{**changes, **ACTIVE}.items()]
    )
    return variant.flops(config, vocab_size)

  def row(dispatch):
    more = {**changes, 'moe.dispatch': dispatch}
    run = variant.Variant(more, gpu_300m.get_config(), vocab_size)
    figures = _trained(run, vocab_size)
    flops = active_flops()
    mfu = flops / figures['step_sec'] / _PEAK_FLOPS.value
    # The peak is that of a GPU.
    return {
      **figures,
      'active_flops': flops,
      'mfu': None if _TINY.value else mfu,
    }

  for dispatch in ('auto', 'dropless', 'capacity'):
    yield f'gpu_300m {dispatch}', functools.partial(row, dispatch)


def _trained(run: variant.Variant, vocab_size: int) -> dict[str, Any]:
  """Returns the figures of steps that are queued without waiting."""
  config, start = run.config, time.perf_counter()
  compiled = run.compile()
  compile_sec = time.perf_counter() - start
  shape = config.batch_size, config.block_size + 1
  rng = np.random.default_rng(1)

  def batch():
    tokens = rng.integers(0, vocab_size, shape, np.int32)
    batch = {**run.batch, 'inputs': tokens[:, :-1], 'targets': tokens[:, 1:]}
    return jax.device_put(batch)

  num_warm, num_steps = 3, _STEPS.value
  batches = [batch() for _ in range(num_warm + num_steps)]
  counts = parameters.count(run.state.params, config.moe.top_k)
  losses, state, start = [], run.state, 0.0
  for i, inputs in enumerate(batches):
    if i == num_warm:
      jax.block_until_ready(state)
      start = time.perf_counter()
    state, metrics = compiled(state, inputs, run.key)
    losses.append(metrics['train/loss'])
  jax.block_until_ready(state)
  step_sec = (time.perf_counter() - start) / num_steps
  losses = [float(loss.compute()) for loss in jax.device_get(losses)]
  tokens = config.batch_size * config.block_size
  run.state = state
  return {
    'dispatch': config.moe.dispatch,
    'precision': config.precision,
    'num_steps': num_steps,
    **counts,
    'tokens_per_step': tokens,
    'compile_sec': compile_sec,
    'step_sec': step_sec,
    'tokens_per_sec': tokens / step_sec,
    'first_loss': losses[0],
    'last_loss': losses[-1],
    'finite': bool(np.isfinite(losses).all()),
    'temporary_bytes': gpu_layers.temporary_bytes(compiled),
    'state_bytes': sum(x.nbytes for x in jax.tree.leaves(state)),
    # Of the whole process, which an earlier row may have set.
    'device_peak_bytes': _memory().get('peak_bytes_in_use'),
  }


def _memory() -> dict[str, int]:
  return jax.local_devices()[0].memory_stats() or {}


def base_step() -> Rows:
  """Yields rows of seconds of a step of configs/base.py."""

  def row(dispatch):
    changes = {'moe.dispatch': dispatch, 'precision': 'bfloat16'}
    if _TINY.value:
      changes |= {k: v for k, v in SMALL.items() if 'kv' not in k}
    run = variant.Variant(changes, base.get_config())
    queued = _trained(run, variant.VOCAB_SIZE)
    waiting = [run() for _ in range(_STEPS.value + 1)][1:]
    return {**queued, 'waiting': peers.summary(waiting)}

  for dispatch in ('grouped', 'dropless', 'capacity', 'dense'):
    yield f'base {dispatch}', functools.partial(row, dispatch)


def parity() -> Rows:
  """Yields rows of `gpu_layers.parity`."""
  return gpu_layers.parity(
    gpu_layers.TINY if _TINY.value else gpu_layers.PARITY
  )


def layers() -> Rows:
  """Yields rows of `gpu_layers.times`."""
  sizes = (gpu_layers.TINY,) if _TINY.value else gpu_layers.LAYERS
  return gpu_layers.times(sizes, _STEPS.value)


PARTS: dict[str, Callable[[], Rows]] = {
  'train': train,
  'parity': parity,
  'layers': layers,
  'base': base_step,
}


def measure(part: str, limit_sec: float) -> None:
  """Measures the rows of a part and writes each one.

  A row that fails is an entry of `errors`. Rows are skipped once the limit has
  passed.

  Args:
    part: Key of `PARTS`.
    limit_sec: Time limit, in seconds.
  """
  begin = time.perf_counter()
  jax_settings.pin()
  device = jax.devices()[0]
  _update(
    device={
      'platform': device.platform,
      'kind': device.device_kind,
      'count': len(jax.devices()),
      'bytes_limit': _memory().get('bytes_limit'),
    }
  )
  if device.platform != 'gpu' and not _TINY.value:
    raise UserError(
      f'--part={part}: the device is a {device.platform}, and a GPU is needed; '
      '--tiny runs on any device'
    )
  rows, errors = [], {}
  for name, run in PARTS[part]():
    start = time.perf_counter()
    if start - begin > limit_sec:
      errors[name] = f'skipped: {limit_sec:.0f} s have passed'
    else:
      try:
        row = {'name': name, **run()}
        rows.append({**row, 'wall_sec': time.perf_counter() - start})
      except Exception:  # Whatever fails on a GPU, other figures are kept.
        errors[name] = traceback.format_exc(limit=-3)
        traceback.print_exc()
    seconds = time.perf_counter() - start
    outcome = 'no figures' if name in errors else 'done'
    print(f'{part}: {name}: {outcome} in {seconds:.1f} s', flush=True)
    _update(**{part: {'rows': rows, 'errors': errors}})


def _name() -> str:
  return 'gpu_tiny' if _TINY.value else 'gpu'


def _update(**sections: Any) -> None:
  """Replaces sections of the file."""
  directory = pathlib.Path(_OUT.value)
  figures = results.read(_name(), directory) or {}
  figures.pop('machine', None)
  results.write(_name(), {**figures, **sections}, directory)


def main(_: None) -> int:
  if _PART.value:
    measure(_PART.value, _SECONDS.value)
    return 0
  parts = _ONLY.value or [*PARTS]
  if unknown := set(parts) - set(PARTS):
    raise UserError(
      f'--only={",".join(unknown)}: no such part; allowed: {", ".join(PARTS)}'
    )
  _update(
    tiny=_TINY.value, peak_flops=_PEAK_FLOPS.value, seconds={}, statuses={}
  )
  seconds, statuses, spare = {}, {}, 0.0
  for part in parts:
    limit, start = LIMITS[part] + spare, time.perf_counter()
    words = [
      *(sys.executable, '-m', 'benchmarks.gpu', f'--part={part}'),
      # The process that is killed loses the row that it measures.
      f'--seconds={0.8 * limit}',
      f'--out={_OUT.value}',
      f'--tiny={_TINY.value}',
      f'--steps={_STEPS.value}',
      f'--peak_flops={_PEAK_FLOPS.value}',
    ]
    try:
      status = subprocess.run(
        words, timeout=limit, cwd=peers.ROOT, check=False
      ).returncode
    except subprocess.TimeoutExpired:
      status = 'killed at its time limit'
    seconds[part] = time.perf_counter() - start
    spare = max(0.0, limit - seconds[part])
    statuses[part] = status
    print(f'{part}: status {status}, {seconds[part]:.0f} s', flush=True)
    _update(seconds=seconds, statuses=statuses)
  return 0 if not any(statuses.values()) else 1


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__ or ''))
