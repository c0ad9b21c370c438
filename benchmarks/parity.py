"""python -m benchmarks.parity [--only=REGEX]

Trains a small model for 10 steps on meshes of virtual CPU devices and compares
it with the same steps on one device, in float32: losses, parameters, expert
counts and dropout bits. Routers start skewed, and a batch has padding. Lists
the collectives of each compiled step, with their bytes on one device. Writes
benchmarks/results/parity.json.
"""

from collections.abc import Mapping
import re
from typing import Any, NamedTuple

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from configs import base
from nanomoe import experiment, optimizers
from nanomoe.config import overrides as config_lib
from nanomoe.config.schema import Config
from nanomoe.model import parameters
from nanomoe.ops.dropout import keep_mask
from nanomoe.run import cli
from trainers import step as step_lib
from trainers.mesh import Placement, make_mesh
from trainers.state import TrainState

_FLAGS = flags.FlagValues()
_ONLY = flags.DEFINE_string(
  'only', '', 'Pattern of the rows to measure.', flag_values=_FLAGS
)

NUM_DEVICES = 8
VOCAB_SIZE = 65
NUM_STEPS = 10
SMALL = {
  'batch_size': 16,
  'block_size': 16,
  'precision': 'float32',
  'model.d_model': 32,
  'model.num_layers': 2,
  'model.num_heads': 4,
  'model.dropout_rate': 0.0,
  # Without rotation the gradient of the keys' biases is 0 but for rounding,
  # which AdamW would divide by itself.
  'model.position': 'rope',
  'moe.num_experts': 8,
  'moe.d_ff': 64,
  'optimizer.learning_rate': 1e-4,
  'mesh.data': 1,
}
MESHES: dict[str, dict[str, int]] = {
  'data 8': {'data': 8},
  'fsdp 8': {'fsdp': 8},
  'expert 8': {'expert': 8},
  'tensor 2': {'tensor': 2},
  'tensor 4': {'tensor': 4},
  'data 2 x fsdp 2 x expert 2': {'data': 2, 'fsdp': 2, 'expert': 2},
  'data 2 x expert 2 x tensor 2': {'data': 2, 'expert': 2, 'tensor': 2},
  'fsdp 4 x tensor 2': {'fsdp': 4, 'tensor': 2},
}
DISPATCHES = ('dense', 'dropless', 'capacity', 'grouped')
VARIANTS: dict[str, dict[str, Any]] = {
  'plain': {},
  'dropout': {'model.dropout_rate': 0.1},
  'remat': {'model.remat': 'block'},
  'accumulation': {'accumulate_steps': 2},
  'scan': {'model.scan_layers': True},
}
# Factor of the routers' initial weights, which makes loads unequal.
SKEW = 6.0
# For programs that run once.
QUICK = {'xla_backend_optimization_level': 0}


class Outcome(NamedTuple):
  """Result of a few training steps.

  Attributes:
    losses: Loss of each step.
    params: Parameters after the last step, on the host.
    load: Number of assignments of each expert in all steps.
    program: Text of the compiled step.
  """

  losses: np.ndarray
  params: Any
  load: np.ndarray
  program: str


def make_config(changes: Mapping[str, Any]) -> Config:
  """Returns the small config with changes."""
  values = {**SMALL, **changes}
  config = config_lib.apply(
    base.get_config(), [(key, str(value)) for key, value in values.items()]
  )
  return experiment.resolve_auto(config)


def make_batch(config: Config, index: int) -> dict[str, np.ndarray]:
  """Returns random tokens; half of the last sequence is padding."""
  rng = np.random.default_rng(index)
  shape = config.batch_size, config.block_size
  weights = np.ones(shape, np.float32)
  weights[-1, shape[1] // 2 :] = 0
  return {
    'inputs': rng.integers(0, VOCAB_SIZE, shape).astype(np.int32),
    'targets': rng.integers(0, VOCAB_SIZE, shape).astype(np.int32),
    'weights': weights,
  }


def train(config: Config, num_steps: int = NUM_STEPS) -> Outcome:
  """Trains from skewed routers on the mesh of a config."""
  mesh = make_mesh(config.mesh.to_dict())
  task = experiment.build_task(config, VOCAB_SIZE, mesh=mesh)
  optimizer, schedule = optimizers.build(config.optimizer, num_steps)
  batch = make_batch(config, 0)

  def create(key):
    params, model_state = task.init(key, batch)
    params = jax.tree_util.tree_map_with_path(
      lambda path, x: SKEW * x if 'router' in jax.tree_util.keystr(path) else x,
      params,
    )
    return TrainState.create(params, model_state, optimizer)

  placement = Placement(mesh, parameters.axes)
  # Equal initial weights, whatever the mesh.
  state = jax.jit(create, compiler_options=QUICK)(jax.random.key(0))
  shardings = placement.shardings(state)
  state = placement.put(state, shardings)
  step = jax.jit(
    step_lib.make_train_step(
      task,
      optimizer,
      schedule,
      accumulate_steps=config.accumulate_steps,
    ),
    donate_argnums=0,
    out_shardings=(shardings, placement.replicated),
  )
  key = placement.put(jax.random.key(1))
  compiled = step.lower(state, placement.put_batch(batch), key).compile()
  losses, load = [], 0
  for index in range(num_steps):
    batch = placement.put_batch(make_batch(config, index))
    state, metrics = compiled(state, batch, key)
    losses.append(metrics['train/loss'].compute())
    load += np.asarray(metrics['train/expert_load'].total)
  return Outcome(
    np.array(losses),
    jax.device_get(state.params),
    np.asarray(load),
    compiled.as_text(),
  )


def differences(outcome: Outcome, reference: Outcome) -> dict[str, Any]:
  """Returns the largest differences of two outcomes.

  Losses are compared relatively; parameters absolutely.
  """
  relative = np.abs(outcome.losses / reference.losses - 1)
  by_leaf = jax.tree.map(
    lambda a, b: float(np.max(np.abs(a - b))), outcome.params, reference.params
  )
  return {
    'loss': float(relative.max()),
    'params': max(jax.tree.leaves(by_leaf)),
    'same_load': bool(np.array_equal(outcome.load, reference.load)),
  }


def has_same_dropout(sizes: Mapping[str, int]) -> bool:
  """Returns whether a mask that is divided over a mesh has the same bits."""

  def mask(key):
    return keep_mask(key, 0.1, (16, 8, 32))[0]

  placement = Placement(make_mesh(sizes))
  divided = jax.jit(mask, out_shardings=placement.batch)
  key = jax.random.key(3)
  return bool(
    jnp.array_equal(
      np.asarray(divided(placement.put(key))), np.asarray(jax.jit(mask)(key))
    )
  )


_SIZES = {'f32': 4, 's32': 4, 'u32': 4, 'bf16': 2, 'pred': 1, 's8': 1, 'u8': 1}
_COLLECTIVE = re.compile(
  r'^\s*(?:ROOT )?%?\S+ = (.*?) (all-gather|all-reduce|reduce-scatter'
  r'|all-to-all|collective-permute)(?:-start)?\(',
  re.MULTILINE,
)


def collectives(program: str) -> dict[str, dict[str, int]]:
  """Returns number and bytes of each kind of collective in a program.

  Bytes are of the results on one device. The body of a loop counts once.
  """
  found: dict[str, dict[str, int]] = {}
  for types, kind in _COLLECTIVE.findall(program):
    entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
    entry['count'] += 1
    for name, shape in re.findall(r'(\w+)\[([\d,]*)\]', types):
      size = np.prod([int(n) for n in shape.split(',') if n], dtype=int)
      entry['bytes'] += _SIZES.get(name, 0) * int(size)
  return found


def measure(only: str = '') -> list[dict[str, Any]]:
  """Returns a row for each dispatch, variant and mesh."""
  rows: list[dict[str, Any]] = []
  same_dropout: dict[str, bool] = {}
  for dispatch in DISPATCHES:
    for variant, changes in VARIANTS.items():
      if dispatch == 'capacity' and variant == 'accumulation':
        continue  # Refused: a micro-batch would have a capacity of its own.
      changes = {**changes, 'moe.dispatch': dispatch}
      meshes = {
        mesh: sizes
        for mesh, sizes in MESHES.items()
        if re.search(only, f'{dispatch} {variant} {mesh}')
      }
      if not meshes:
        continue
      for mesh in meshes.keys() - same_dropout.keys():
        same_dropout[mesh] = has_same_dropout(meshes[mesh])
      reference = train(make_config(changes))
      for mesh, sizes in meshes.items():
        on_mesh = {f'mesh.{axis}': size for axis, size in sizes.items()}
        outcome = train(make_config({**changes, **on_mesh}))
        rows.append(
          {
            'mesh': mesh,
            'dispatch': dispatch,
            'variant': variant,
            **differences(outcome, reference),
            'same_dropout': same_dropout[mesh],
            'collectives': collectives(outcome.program),
          }
        )
        print(rows[-1], flush=True)
  return rows


def table(figures: dict[str, Any]) -> str:
  """Returns Markdown: a row for each mesh, over dispatches and variants."""
  lines = [
    '| mesh | programs | loss, relative | parameters | expert counts | dropout '
    '| collectives of a dropless step: number, kB |',
    '|---|---:|---:|---:|---|---|---|',
  ]
  for mesh in MESHES:
    rows = [row for row in figures['rows'] if row['mesh'] == mesh]
    (plain,) = (
      row
      for row in rows
      if (row['dispatch'], row['variant']) == ('dropless', 'plain')
    )
    moved = ', '.join(
      f'{kind} {entry["count"]}, {entry["bytes"] / 1e3:.0f}'
      for kind, entry in sorted(plain['collectives'].items())
    )
    is_same = {
      key: 'equal' if all(row[key] for row in rows) else 'DIFFERENT'
      for key in ('same_load', 'same_dropout')
    }
    lines.append(
      f'| {mesh} | {len(rows)} | {max(row["loss"] for row in rows):.1e} '
      f'| {max(row["params"] for row in rows):.1e} | {is_same["same_load"]} '
      f'| {is_same["same_dropout"]} | {moved} |'
    )
  return '\n'.join(lines)


def main(_) -> int:
  rows = measure(_ONLY.value)
  if not _ONLY.value:
    results.write('parity', {'num_steps': NUM_STEPS, 'rows': rows})
  return 0


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', NUM_DEVICES)
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__ or ''))
