"""Plan of a training run, from the answers of a worker."""

from collections.abc import Callable
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

from nanomoe.config import layers, schema, validation
from nanomoe.config.schema import Config
from nanomoe.planning import collectives, hardware
from trainers.errors import UserError
from trainers.mesh import BATCH_AXES, mesh_shape

# Virtual devices that one process can have.
MAX_VIRTUAL = 2048
# Layers that are compiled as they are; deeper unrolled models are extrapolated.
MAX_LAYERS = 8
# Multiples of the batch that are compiled to find the largest one. Memory bends
# upwards: with small batches the peak is in the optimizer.
BATCH_FACTORS = (1, 4, 16)
# Keys of `work`.
WORK = (
  'num_params',
  'num_active_params',
  'flops_per_token',
  'active_flops_per_token',
  'generation_problem',
)

Number = float | int


class Target(NamedTuple):
  """Hardware of a plan.

  Attributes:
    num_devices: Number of devices; 0 for as many as the mesh has.
    memory: Memory of a device, bytes; 0 plans no largest batch.
    peak_flops: Peak of a device, FLOP/s; 0 plans no time.
    mfu: Share of the peak that active experts' products reach.
  """

  num_devices: int = 0
  memory: int = 0
  peak_flops: float = 0.0
  mfu: float = 0.4


def make(
  config: Config,
  vocab_size: int,
  target: Target,
  max_layers: int = MAX_LAYERS,
) -> dict[str, Any]:
  """Returns the plan of a run as JSON values; docs/guides/planning.md has keys.

  A child process with virtual CPU devices traces and compiles the step. This
  process needs no device.

  Args:
    config: Checked config.
    vocab_size: Number of tokens in the vocabulary.
    target: Hardware.
    max_layers: Largest unrolled depth that is compiled as it is.

  Raises:
    UserError: The config does not divide over the mesh, a part of it cannot be
      built, or the model does not fit at the smallest batch.
  """
  sizes = _mesh(config, target.num_devices)
  flat = dict(schema.flatten(config.to_dict()))
  if lines := [*validation.mesh_problems(flat, sizes)]:
    raise UserError(lines)
  compiled_sizes = _reduced(sizes)
  depths = _depths(config, max_layers)
  batch_size = config.batch_size
  factors = BATCH_FACTORS if target.memory else (1,)
  batch_sizes = [factor * batch_size for factor in factors]
  found = ask(
    {
      'config': config.to_dict(),
      'vocab_size': vocab_size,
      'sizes': sizes,
      'compiled_sizes': compiled_sizes,
      'depths': depths,
      'batch_sizes': batch_sizes,
    },
    math.prod(compiled_sizes.values()),
  )
  del found['generation_problem']  # It is no need of a run.
  points = {(p[0], p[1]): p for p in found.pop('points')}
  steps = _steps(config, depths)

  def at_depth(read: Callable[[list], Number], batch: int) -> Number:
    values = [read(points[depth, batch]) for depth in depths]
    return values[0] + steps * (values[-1] - values[0])

  memory = _memory(found, at_depth, batch_size)
  first, last = (
    collectives.from_json(points[depth, batch_size][4])
    for depth in (depths[0], depths[-1])
  )
  traffic = collectives.extrapolate(first, last, steps)
  plan = {
    'mesh': sizes,
    'num_devices': math.prod(sizes.values()),
    'vocab_size': vocab_size,
    'batch_size': batch_size,
    'block_size': config.block_size,
    'num_train_steps': config.num_train_steps,
    **found,
    'memory': memory,
    'collectives': {k: v._asdict() for k, v in sorted(traffic.kinds.items())},
    'open_loops': traffic.open_loops,
    'peak_process_bytes': _peak_process_bytes(found['process'], memory),
    'compiled': {
      'depths': depths,
      'num_layers': config.model.num_layers,
      'batch_sizes': batch_sizes,
      'mesh': compiled_sizes,
      'xla_flags': os.environ.get('XLA_FLAGS', ''),
      'seconds': sum(p[5] for p in points.values()),
    },
  }
  if target.memory:
    plan |= _largest_batch(config, sizes, target, plan, at_depth)
  if target.peak_flops:
    plan |= _time(config, target, plan)
  return plan


def work(
  config: Config, vocab_size: int, num_devices: int = 0
) -> dict[str, Any]:
  """Returns the parameters and the FLOPs of a model, without compilation.

  A child process traces the step on a CPU. This process needs no device.

  Args:
    config: Checked config.
    vocab_size: Number of tokens in the vocabulary.
    num_devices: Number of devices, as in `Target`.

  Returns:
    `num_params`, `num_active_params`, `flops_per_token` and
    `active_flops_per_token`, as in a plan, and `generation_problem`, as of
    `nanomoe.model.build`.

  Raises:
    UserError: The config does not divide over the mesh, or a part of it cannot
      be built.
  """
  sizes = _mesh(config, num_devices)
  request = {'config': config.to_dict(), 'vocab_size': vocab_size}
  request |= {'sizes': sizes, 'compiled_sizes': dict.fromkeys(sizes, 1)}
  found = ask({**request, 'depths': [], 'batch_sizes': []}, 1)
  return {name: found[name] for name in WORK}


def _mesh(config: Config, num_devices: int) -> dict[str, int]:
  """Returns the size of each axis, with -1 replaced.

  Raises:
    UserError: The mesh has -1 and no number of devices, or another number.
  """
  given = config.mesh.to_dict()
  shown = ' '.join(f'mesh.{axis}={n}' for axis, n in given.items() if n != 1)
  if -1 in given.values() and not num_devices:
    raise UserError(f'{shown}: -1 means all devices; it needs --devices')
  shape = mesh_shape(given, num_devices)
  size = math.prod(shape)
  if num_devices and size != num_devices:
    raise UserError(
      f'--devices={num_devices}: the mesh {shown or "mesh.data=1"} has {size} '
      'places; they must be equal, or one axis must be -1'
    )
  return dict(zip(validation.MESH_AXES, shape, strict=True))


def _reduced(sizes: dict[str, int]) -> dict[str, int]:
  """Returns a mesh that fits one process, with fewer copies of the data.

  Raises:
    UserError: The other axes alone have too many places.
  """
  others = math.prod(n for axis, n in sizes.items() if axis != 'data')
  if others > MAX_VIRTUAL:
    raise UserError(
      f'mesh.fsdp * mesh.expert * mesh.tensor={others}: a plan compiles for at '
      f'most {MAX_VIRTUAL} virtual devices, and only mesh.data may exceed them'
    )
  data = sizes['data']
  fitting = [
    n for n in range(1, data + 1) if data % n == 0 and n * others <= MAX_VIRTUAL
  ]
  return {**sizes, 'data': fitting[-1]}


def _depths(config: Config, max_layers: int) -> list[int]:
  """Returns the depths to compile: that of the model, or two smaller ones."""
  num_layers = config.model.num_layers
  unrolled, period = _repetition(config)
  # A scan is compiled as fast at any depth.
  first = unrolled + period + (num_layers - unrolled) % period
  if config.model.scan_layers or num_layers <= max(max_layers, first + period):
    return [num_layers]
  # With few layers the peak may be in the head, so the deeper pair is taken.
  periods = max((max_layers - first) // period, 1)
  return [first + periods // 2 * period, first + periods * period]


def _steps(config: Config, depths: list[int]) -> Number:
  """Returns how often the second depth's growth is in the model's layers."""
  distance = config.model.num_layers - depths[0]
  return distance / (depths[-1] - depths[0]) if distance else 0


def _repetition(config: Config) -> tuple[int, int]:
  moe = config.moe
  return layers.repetition(
    config.model.num_layers, moe.first_dense_layers, moe.every
  )


def ask(request: dict[str, Any], num_devices: int) -> dict[str, Any]:
  """Returns the answer of a worker.

  Args:
    request: Fields of `worker.Request`.
    num_devices: Number of virtual devices.

  Raises:
    UserError: The worker reports mistakes.
    RuntimeError: The worker fails.
  """
  root = str(pathlib.Path(__file__).parents[2])
  path = [root, *(p for p in sys.path if p), os.getcwd()]
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(num_devices),
    # A program from the cache may lack its text and its memory.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',
    'PYTHONPATH': os.pathsep.join(path),
  }
  process = subprocess.run(
    [sys.executable, '-m', 'nanomoe.planning.worker'],
    input=json.dumps(request),
    capture_output=True,
    text=True,
    env=environment,
    check=False,
  )
  if process.returncode:
    last = '\n'.join(process.stderr.strip().splitlines()[-20:])
    raise RuntimeError(f'the worker ended with {process.returncode}:\n{last}')
  answer = json.loads(process.stdout.splitlines()[-1])
  if 'problems' in answer:
    raise UserError(answer['problems'])
  return answer


def _memory(
  found: dict[str, Any], at_depth: Callable[..., Number], batch_size: int
) -> dict[str, Number]:
  """Returns the bytes on each device by term; `total` is their sum.

  XLA places gradients and activations itself. The activations are what remains
  of a step's temporary memory after gradients and logits, with all copies.
  """
  state, logits = found.pop('state'), found.pop('logits')
  arguments = at_depth(lambda p: p[2], batch_size)
  temporaries = at_depth(lambda p: p[3], batch_size)
  gradients = min(state['weights'], temporaries)
  logits = min(logits, temporaries - gradients)
  return {
    **state,
    'batch': arguments - sum(state.values()),
    'gradients': gradients,
    'logits': logits,
    'activations': temporaries - gradients - logits,
    'total': arguments + temporaries,
  }


def _peak_process_bytes(
  process: dict[str, int], memory: dict[str, Number]
) -> Number:
  """Returns the peak resident set size of a run on one CPU.

  The peak is that of the compiler, beside the state, or that of a step. A
  process that compiled small parts of a deep model understates it.

  Args:
    process: Resident set sizes of the worker, in bytes.
    memory: Bytes by term.
  """
  state = sum(memory[k] for k in ('weights', 'optimizer', 'average'))
  return max(
    process['compiling'] + state, process['compiled'] + memory['total']
  )


def _largest_batch(
  config: Config,
  sizes: dict[str, int],
  target: Target,
  plan: dict[str, Any],
  at_depth: Callable[..., Number],
) -> dict[str, Any]:
  """Returns the largest batch that fits the memory of a device.

  Raises:
    UserError: The smallest batch does not fit.
  """
  smallest = config.accumulate_steps * math.prod(sizes[a] for a in BATCH_AXES)
  batches = [factor * config.batch_size for factor in BATCH_FACTORS]
  totals = [at_depth(lambda p: p[2] + p[3], batch) for batch in batches]
  # The segment that holds the limit; the first and the last are rays.
  inner = zip(batches[1:-1], totals[1:-1], strict=True)
  first = sum(total <= target.memory for _, total in inner)
  batch_size, total = batches[first], totals[first]
  of_sequence = max(
    (totals[first + 1] - total) / (batches[first + 1] - batch_size), 1e-9
  )
  limit = batch_size + (target.memory - total) / of_sequence
  largest = int(min(limit, 2**31 - 1) // smallest) * smallest
  if largest < smallest:
    needed = total - (batch_size - smallest) * of_sequence
    memory = plan['memory']
    state = sum(memory[k] for k in ('weights', 'optimizer', 'average'))
    raise UserError(
      f'memory of {hardware.shown(target.memory)} per device: the smallest '
      f'batch, batch_size={smallest}, needs {hardware.shown(needed)}, of which '
      f'{hardware.shown(state)} are weights and optimizer; a larger mesh.fsdp '
      'or mesh.expert divides them'
    )
  return {
    'memory_per_device': target.memory,
    'bytes_per_sequence': of_sequence * math.prod(sizes[a] for a in BATCH_AXES),
    'largest_batch_size': largest,
  }


def _time(
  config: Config, target: Target, plan: dict[str, Any]
) -> dict[str, Any]:
  """Returns the time of the run, if products reach the share of the peak."""
  tokens = config.batch_size * config.block_size
  work = plan['active_flops_per_token'] * tokens
  step = work / (target.mfu * target.peak_flops * plan['num_devices'])
  return {
    'peak_flops': target.peak_flops,
    'mfu': target.mfu,
    'step_seconds': step,
    'train_seconds': step * config.num_train_steps,
    'tokens_per_second': tokens / step,
  }
