"""python -m benchmarks.profile [--top=N]

Where the time of a training step of configs/base.py goes: by group of
operations, from XLA's own trace, beside what a group would cost at the rates
that this machine reaches: floating-point work over the best product's rate,
bytes in and out over a copy's. An operation that XLA fused of several belongs
to the group of its last. Writes benchmarks/results/profile.json.
"""

import collections
import functools
import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp

from benchmarks import results
from benchmarks.variant import Variant
from nanomoe.planning import hlo
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_integer(
  'steps', 10, 'Traced.', lower_bound=1, flag_values=_FLAGS
)
_TOP = flags.DEFINE_integer(
  'top', 0, 'Also prints so many operations.', flag_values=_FLAGS
)

# The first whose word is in an operation's source decides.
_GROUPS = {
  'Dropout': 'dropout',
  '_norm': 'layer norms',
  'attention': 'attention, but products',
  'router': 'router',
  'moe': 'experts, but products',
  'jvp': 'embeddings, head and loss',
}


def group(op: hlo.Op) -> str:
  """Of an operation, by the module that asked for it."""
  if op.flops > 1e6:
    owner = 'experts' if '/moe' in op.source else 'attention'
    return f'products of {owner if "block_" in op.source else "head"}'
  found = (name for word, name in _GROUPS.items() if word in op.source)
  return next(found, 'optimizer and copies')


def measure(steps: int, variant: Variant) -> dict[str, Any]:
  """Figures of the step, and of each group of its operations."""
  lowered = variant.jitted.lower(variant.state, variant.batch, variant.key)
  ops = hlo.parse(lowered.compile().as_text())
  for _ in range(3):
    variant()
  plain = statistics.median(variant() for _ in range(steps))
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      traced = statistics.median(variant() for _ in range(steps))
    taken, starts = _wall(pathlib.Path(directory), ops)
  rates = {
    'flop_per_sec': _product_rate(variant.config.precision),
    'bytes_per_sec': _copy_rate(),
  }
  groups: dict[str, Any] = collections.defaultdict(
    lambda: {'sec': 0.0, 'ideal_sec': 0.0, 'gflop': 0.0, 'calls': 0.0}
  )
  top = []
  for name, seconds in taken.items():
    op, calls = ops[name], starts[name] / steps
    own = seconds / steps
    ideal = max(
      op.flops / rates['flop_per_sec'], op.bytes / rates['bytes_per_sec']
    )
    row = groups[group(op)]
    row['sec'] += own
    row['ideal_sec'] += ideal * calls
    row['gflop'] += op.flops * calls / 1e9
    row['calls'] += calls
    top.append((own, ideal * calls, name, op.source))
  idle = traced - sum(row['sec'] for row in groups.values())
  groups['none under way'] = {
    'sec': max(idle, 0.0),
    'ideal_sec': 0.0,
    'gflop': 0.0,
    'calls': 0.0,
  }
  return {
    'step_sec': plain,
    'traced_step_sec': traced,
    **rates,
    'groups': dict(sorted(groups.items(), key=lambda x: -x[1]['sec'])),
    'top': sorted(top, reverse=True)[: _TOP.value],
  }


def _wall(
  directory: pathlib.Path, ops: dict[str, hlo.Op]
) -> tuple[collections.Counter[str], collections.Counter[str]]:
  """By operation: seconds of the clock, and how often it ran.

  The trace shows an operation on the thread that began it, not on those that
  help. So each instant is shared by the operations that are then under way. A
  loop's time is that of the operations in it.
  """
  (path,) = directory.rglob('*.xplane.pb')
  data = jax.profiler.ProfileData.from_file(str(path))
  edges, calls = [], collections.Counter()
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        op = ops.get(event.name)
        if op and op.code not in ('while', 'call', 'conditional'):
          calls[event.name] += 1
          end = event.start_ns + event.duration_ns
          edges += [(event.start_ns, 1, event.name), (end, -1, event.name)]
  seconds, active, before = collections.Counter(), collections.Counter(), 0.0
  for now, change, name in sorted(edges):
    for other in active:
      seconds[other] += (now - before) / 1e9 / len(active)
    active[name] += change
    if not active[name]:
      del active[name]
    before = now
  return seconds, calls


def _product_rate(precision: str) -> float:
  """Floating-point operations a second of a large product, as base.py's."""
  x, w = jnp.ones((8192, 512), precision), jnp.ones((512, 512), precision)
  product = functools.partial(
    jnp.einsum, 'nd,df->nf', preferred_element_type=jnp.float32
  )
  return 2 * x.size * w.shape[1] / _best(product, x, w)


def _copy_rate() -> float:
  """Bytes read and written a second, of 16 MB in place."""
  x = jnp.ones((1 << 22,))
  jitted = jax.jit(lambda x: x + 1, donate_argnums=0)
  best = math.inf
  for _ in range(20):
    start = time.perf_counter()
    x = jax.block_until_ready(jitted(x))
    best = min(best, time.perf_counter() - start)
  return 2 * x.nbytes / best


def _best(fn, *args) -> float:
  jitted = jax.jit(fn)

  def once() -> float:
    start = time.perf_counter()
    jax.block_until_ready(jitted(*args))
    return time.perf_counter() - start

  return min(once() for _ in range(20))


def table(figures: dict[str, Any]) -> str:
  """Markdown."""
  lines = [
    '| group | ms per step | ms at best | GFLOP | operations |',
    '|---|---:|---:|---:|---:|',
  ]
  lines += [
    f'| {name} | {1000 * row["sec"]:.1f} | {1000 * row["ideal_sec"]:.1f} '
    f'| {row["gflop"]:.1f} | {row["calls"]:.0f} |'
    for name, row in figures['groups'].items()
  ]
  lines += [
    '',
    f'{results.describe(figures["machine"])} A step took '
    f'{1000 * figures["step_sec"]:.0f} ms, or '
    f'{1000 * figures["traced_step_sec"]:.0f} ms with tracing. Best rates: '
    f'{figures["flop_per_sec"] / 1e9:.0f} GFLOP/s, '
    f'{figures["bytes_per_sec"] / 1e9:.0f} GB/s.',
  ]
  return '\n'.join(lines)


def main(_: None) -> int:
  results.write('profile', measure(_STEPS.value, Variant({})))
  figures = results.read('profile') or {}
  print(table(figures))
  for seconds, ideal, name, source in figures['top']:
    print(f'{1e3 * seconds:7.2f} {1e3 * ideal:7.2f}  {name}  {source}')
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
