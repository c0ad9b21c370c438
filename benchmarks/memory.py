"""python -m benchmarks.memory [--only=accumulation,compilation] [--tiny]

Measures four ways to train larger models:
  accumulation   differences of micro-batches from their batch, and temporaries
  compilation    seconds to compile scanned and unrolled layers, in turn
  logits_chunk   temporaries of the output layer and the loss
  remat          temporaries and seconds of each policy of recomputation
Temporaries are those of the compiled program on a CPU. Writes
benchmarks/results/memory.json. --tiny runs small sizes and writes nothing.
"""

from collections.abc import Mapping
import os
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_layers, parity, results
from configs import base
from nanomoe import experiment, optimizers
from nanomoe.config import overrides as config_lib
from nanomoe.config.schema import FIELDS, Config
from nanomoe.model import parameters
from nanomoe.model.heads import tied
from nanomoe.ops.chunks import map_chunks
from nanomoe.ops.cross_entropy import cross_entropy
from nanomoe.run import cli
from trainers import step as step_lib
from trainers.accumulate import Gradient, make_gradient
from trainers.errors import UserError
from trainers.mesh import Placement, make_mesh
from trainers.state import TrainState

_FLAGS = flags.FlagValues()
_ONLY = flags.DEFINE_list(
  'only', [], 'Parts to measure; all by default.', flag_values=_FLAGS
)
_TINY = flags.DEFINE_bool(
  'tiny', False, 'Small sizes; nothing is written.', flag_values=_FLAGS
)

NUM_DEVICES = 4
MICRO_BATCHES = (1, 2, 4, 8)
# Scanned layers compile in less time; the products are those of base.py.
EXACT = {
  'precision': 'float32',
  'model.dropout_rate': 0.0,
  'model.scan_layers': True,
  # A balance loss of micro-batches would be seen in the gradient.
  'moe.aux_weight': 0.5,
}
MESHES = {'data 2': {'data': 2}, 'data 2 x expert 2': {'data': 2, 'expert': 2}}
TINY = {
  'block_size': 16,
  'model.d_model': 16,
  'model.num_layers': 2,
  'moe.d_ff': 16,
}
# Layers and whether they are scanned.
DEPTHS = ((4, True), (24, True), (4, False))
NARROW = {'batch_size': 8, 'block_size': 32, 'model.d_model': 32}
NARROW |= {'moe.d_ff': 64}
NUM_ROUNDS = 3
CHUNKS = (0, 256, 128, 64)
LOSS = {'vocab': 50_304, 'batch': 8, 'time': 1024, 'd_model': 768}
# Long windows, whose attention weights need the most memory.
LONG = {'batch_size': 8, 'block_size': 512, 'precision': 'float32'}


def _config(changes: Mapping[str, Any]) -> Config:
  changes = {**(TINY if _TINY.value else {}), **changes}
  pairs = [(key, str(value)) for key, value in changes.items()]
  return experiment.resolve_auto(config_lib.apply(base.get_config(), pairs))


def _batch(config: Config, *, padded: bool = False) -> dict[str, np.ndarray]:
  """Returns random tokens; with padding, lengths of sequences are random."""
  rng = np.random.default_rng(0)
  batch = parity.make_batch(config, 0)
  length = rng.integers(0, config.block_size + 1, (config.batch_size, 1))
  weights = np.arange(config.block_size) < length
  if not padded:
    weights = np.ones_like(weights)
  return {**batch, 'weights': weights.astype(np.float32)}


def accumulation() -> list[dict[str, Any]]:
  """Returns a row for each balance loss, mesh, padding and micro-batch.

  The row of one micro-batch on one device compares the batch with the same
  sequences in another order, which shows what rounding alone does.
  """
  rows = []
  for balance in FIELDS['moe.balance'].choices:
    meshes = {'one device': {}}
    if balance == base.get_config().moe.balance:
      meshes |= MESHES
    whole: dict[bool, Gradient] = {}
    for mesh, sizes in meshes.items():
      for num_parts in MICRO_BATCHES:
        changes = {**EXACT, 'moe.balance': balance}
        changes |= {f'mesh.{axis}': size for axis, size in sizes.items()}
        found = _gradients(_config(changes), num_parts)
        for padded, (gradient, permuted, temporaries) in found.items():
          if padded not in whole:
            whole[padded], gradient = gradient, permuted
          rows.append(
            {
              'balance': balance,
              'mesh': mesh,
              'padding': padded,
              'accumulate_steps': num_parts,
              **_differences(gradient, whole[padded]),
              'temporary_bytes': temporaries,
            }
          )
          print(rows[-1], flush=True)
  return rows


def _gradients(
  config: Config, num_parts: int
) -> dict[bool, tuple[Gradient, Gradient, int | None]]:
  """Returns gradients without and with padding, and bytes of temporaries.

  The second gradient is that of the sequences in another order.
  """
  mesh = make_mesh(config.mesh.to_dict())
  placement = Placement(mesh, parameters.axes)
  task = experiment.build_task(config, parity.VOCAB_SIZE, mesh=mesh)
  batches = {padded: _batch(config, padded=padded) for padded in (False, True)}
  params, model_state = jax.jit(task.init)(jax.random.key(0), batches[False])
  optimizer, _ = optimizers.build(config.optimizer, 1)
  state = TrainState.create(params, model_state, optimizer)
  state = placement.put(state, placement.shardings(state))
  key = placement.put(jax.random.key(1))
  order = np.random.default_rng(1).permutation(config.batch_size)

  def inputs(batch):
    return state.params, state.model_state, placement.put_batch(batch), key

  gradient = jax.jit(make_gradient(task, num_parts))
  lowered = gradient.lower(*inputs(batches[False]))
  # Optimizing a program that runs four times takes longer than it saves.
  compiled = lowered.compile({'xla_backend_optimization_level': 0})
  temporaries = gpu_layers.temporary_bytes(compiled)
  found = {}
  for padded, batch in batches.items():
    permuted = {name: x[order] for name, x in batch.items()}
    one, other = (
      jax.device_get(compiled(*inputs(b))) for b in (batch, permuted)
    )
    found[padded] = one, other, temporaries
  return found


def _differences(found: Gradient, whole: Gradient) -> dict[str, Any]:
  """Returns relative differences: of the loss, and the largest of an array."""
  of_arrays = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max() / (np.abs(b).max() or 1)),
    found.grads,
    whole.grads,
  )
  return {
    'loss': abs(float(found.loss / whole.loss) - 1),
    'gradient': max(jax.tree.leaves(of_arrays)),
    'same_load': bool(
      np.array_equal(
        found.aux.statistics['expert_load'],
        whole.aux.statistics['expert_load'],
      )
    ),
  }


def compilation() -> list[dict[str, Any]]:
  """Returns a row for each depth, with the seconds of each round."""
  rows: list[dict[str, Any]] = [
    {'num_layers': num_layers, 'scan_layers': scan, 'compile_sec': []}
    for num_layers, scan in DEPTHS
  ]
  for _ in range(NUM_ROUNDS):
    for row in rows:
      changes = {
        **NARROW,
        'model.num_layers': row['num_layers'],
        'model.scan_layers': row['scan_layers'],
      }
      row['compile_sec'].append(_compile_sec(_config(changes)))
      print(row, flush=True)
  return rows


def _compile_sec(config: Config) -> float:
  """Returns the seconds to compile a step, without tracing it."""
  task = experiment.build_task(config, parity.VOCAB_SIZE)
  optimizer, schedule = optimizers.build(config.optimizer, 1)
  batch, key = _batch(config), jax.random.key(0)
  state = jax.eval_shape(
    lambda key: TrainState.create(*task.init(key, batch), optimizer), key
  )
  step = step_lib.make_train_step(task, optimizer, schedule)
  lowered = jax.jit(step).lower(state, batch, key)
  jax.clear_caches()
  start = time.perf_counter()
  lowered.compile()
  return time.perf_counter() - start


def logits_chunk() -> dict[str, Any]:
  """Returns the temporaries of the output layer and the loss, by chunk."""
  sizes = dict.fromkeys(LOSS, 64) if _TINY.value else LOSS
  rows = []
  for size in CHUNKS:

    def loss(embedding, x, targets, size=size):
      head = tied(embedding, use_bias=False, precision='float32')

      def of_tokens(x, targets):
        return cross_entropy(head(x), targets)

      if not size:
        return of_tokens(x, targets).sum()
      return map_chunks(of_tokens, size, x, targets).sum()

    tokens = sizes['batch'], sizes['time']
    shapes = (
      jax.ShapeDtypeStruct((sizes['vocab'], sizes['d_model']), jnp.float32),
      jax.ShapeDtypeStruct((*tokens, sizes['d_model']), jnp.float32),
      jax.ShapeDtypeStruct(tokens, jnp.int32),
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    temporaries = gpu_layers.temporary_bytes(step.lower(*shapes).compile())
    rows.append({'chunk': size, 'temporary_bytes': temporaries})
    print(rows[-1], flush=True)
  return {**sizes, 'rows': rows}


def remat() -> list[dict[str, Any]]:
  """Returns a row for each policy: temporaries and seconds of a gradient."""
  rows, runs = [], []
  for policy in FIELDS['model.remat'].choices:
    config = _config({**LONG, 'model.remat': policy})
    task = experiment.build_task(config, parity.VOCAB_SIZE)
    batch, key = _batch(config), jax.random.key(1)
    params, model_state = jax.jit(task.init)(jax.random.key(0), batch)
    inputs = params, model_state, batch, key
    compiled = jax.jit(make_gradient(task)).lower(*inputs).compile()
    runs.append((compiled, inputs))
    temporaries = gpu_layers.temporary_bytes(compiled)
    rows.append({'remat': policy, 'temporary_bytes': temporaries, 'sec': []})
  for i in range(NUM_ROUNDS + 2):
    for row, (compiled, inputs) in zip(rows, runs, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(compiled(*inputs))
      if i:
        row['sec'].append(time.perf_counter() - start)
  print(rows, flush=True)
  return rows


PARTS = {
  'accumulation': accumulation,
  'compilation': compilation,
  'logits_chunk': logits_chunk,
  'remat': remat,
}


def _mb(num_bytes: int | None) -> str:
  return 'unknown' if num_bytes is None else f'{num_bytes / 1e6:.0f} MB'


def accumulation_table(figures: dict[str, Any]) -> str:
  """Returns the rows of `accumulation` as a table in Markdown."""
  lines = [
    '| `moe.balance` | mesh | padding | micro-batches | loss | gradient '
    '| equal expert loads | temporary memory |',
    '|---|---|---|---:|---:|---:|---|---:|',
  ]
  lines += [
    f'| `{row["balance"]}` | {row["mesh"]} '
    f'| {"yes" if row["padding"] else "no"} | {row["accumulate_steps"]} '
    f'| {row["loss"]:.1e} | {row["gradient"]:.1e} '
    f'| {"yes" if row["same_load"] else "no"} '
    f'| {_mb(row["temporary_bytes"])} |'
    for row in figures['accumulation']
  ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def compilation_table(figures: dict[str, Any]) -> str:
  """Returns the rows of `compilation` as a table in Markdown."""
  rows = figures['compilation']
  lines = [
    '| layers | `model.scan_layers` | seconds to compile: least (all) |',
    '|---:|---|---:|',
  ]
  for row in rows:
    seconds = sorted(row['compile_sec'])
    lines.append(
      f'| {row["num_layers"]} | {row["scan_layers"]} | {seconds[0]:.1f} '
      f'({", ".join(f"{s:.1f}" for s in seconds)}) |'
    )
  machine = figures['machine']
  note = f'Times are noisy: the load was {machine["load"]:.1f}.'
  return '\n'.join([*lines, '', f'{results.describe(machine)} {note}'])


def logits_chunk_table(figures: dict[str, Any]) -> str:
  """Returns the rows of `logits_chunk` as a table in Markdown."""
  lines = ['| `model.logits_chunk` | temporary memory |', '|---:|---:|']
  lines += [
    f'| {row["chunk"]} | {_mb(row["temporary_bytes"])} |'
    for row in figures['logits_chunk']['rows']
  ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


def remat_table(figures: dict[str, Any]) -> str:
  """Returns the temporaries of `remat` as a table in Markdown.

  The table has no seconds, because those of a loaded machine do not compare.
  """
  lines = ['| `model.remat` | temporary memory |', '|---|---:|']
  lines += [
    f'| `{row["remat"]}` | {_mb(row["temporary_bytes"])} |'
    for row in figures['remat']
  ]
  return '\n'.join([*lines, '', results.describe(figures['machine'])])


TABLES = {
  'accumulation': accumulation_table,
  'compilation': compilation_table,
  'logits_chunk': logits_chunk_table,
  'remat': remat_table,
}


def main(_: None) -> int:
  if len(jax.devices()) < NUM_DEVICES:
    raise UserError(
      f'JAX_NUM_CPU_DEVICES={len(jax.devices())}: it must be {NUM_DEVICES} or '
      'more'
    )
  if unknown := set(_ONLY.value) - set(PARTS):
    raise UserError(
      f'--only={",".join(unknown)}: no such part; allowed: {", ".join(PARTS)}'
    )
  for part in _ONLY.value or PARTS:
    measured = PARTS[part]()
    if not _TINY.value:
      figures = results.read('memory') or {}
      figures.pop('machine', None)
      results.write('memory', {**figures, part: measured})
  return 0


if __name__ == '__main__':
  os.environ.setdefault('JAX_NUM_CPU_DEVICES', str(NUM_DEVICES))
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__ or ''))
