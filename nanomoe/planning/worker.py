"""Process that traces and compiles the training step of a plan.

It is started with as many virtual CPU devices as the compiled mesh has. A
request is JSON on standard input, and the answer is the last line of standard
output.
"""

import json
import os
import pathlib
import resource
import sys
import time
from typing import Any, NamedTuple

import jax

from nanomoe.config import schema
from nanomoe.config.schema import Config
from nanomoe.model import parameters
from nanomoe.model.build import generation_problem, resolve_auto
from nanomoe.planning import collectives, program
from nanomoe.run import jax_settings
from trainers.errors import UserError
from trainers.mesh import make_abstract_mesh, make_mesh
from trainers.runtime import memory as memory_lib


class Request(NamedTuple):
  """Work of a worker.

  Attributes:
    config: Config with every key, as nested dicts.
    vocab_size: Number of tokens in the vocabulary.
    sizes: Size of each axis of the mesh of the run.
    compiled_sizes: Size of each axis of the mesh of the compiled programs; its
      data axis may be smaller.
    depths: Values of `model.num_layers` to compile; none compiles nothing.
    batch_sizes: Values of `batch_size` to compile, of the mesh of the run.
  """

  config: dict[str, Any]
  vocab_size: int
  sizes: dict[str, int]
  compiled_sizes: dict[str, int]
  depths: list[int]
  batch_sizes: list[int]


class Point(NamedTuple):
  """Compiled program.

  Attributes:
    num_layers: Value of `model.num_layers`.
    batch_size: Value of `batch_size`, of the mesh of the run.
    arguments: Bytes of the arguments on each device.
    temporaries: Bytes that a step allocates besides on each device.
    collectives: As of `collectives.Collectives`.
    seconds: Time of lowering and compiling.
  """

  num_layers: int
  batch_size: int
  arguments: float
  temporaries: float
  collectives: Any
  seconds: float


def answer(request: Request) -> dict[str, Any]:
  """Returns all that a plan needs to know of a config's training step.

  Raises:
    UserError: A part of the config cannot be built.
  """
  jax_settings.pin()
  config = resolve_auto(schema.make(request.config))
  vocab_size = request.vocab_size
  whole = program.make(config, vocab_size, make_abstract_mesh(request.sizes))
  mesh = make_mesh(request.compiled_sizes)
  scale = request.sizes['data'] // request.compiled_sizes['data']
  tokens = config.batch_size * config.block_size
  found = {
    'precision': config.precision,
    'dispatch': config.moe.dispatch,
    **parameters.count(whole.state.params, config.moe.top_k),
    'flops_per_token': program.flops(whole) / tokens,
    'active_flops_per_token': program.active_flops_per_token(
      config, vocab_size, make_abstract_mesh({})
    ),
    'state': program.state_bytes(whole),
    'logits': program.logits_bytes(config, whole, vocab_size),
    'generation_problem': generation_problem(config),
  }
  points, process = [], {}
  for batch_size in request.batch_sizes:
    for depth in request.depths:
      points.append(
        _compile(config, vocab_size, mesh, depth, batch_size, scale)
      )
      process = process or _process_bytes()
  return {**found, 'points': points, 'process': process}


def _compile(
  config: Config,
  vocab_size: int,
  mesh: jax.sharding.Mesh,
  num_layers: int,
  batch_size: int,
  scale: int,
) -> Point:
  start = time.perf_counter()
  values = config.to_dict()
  values['batch_size'] = batch_size // scale
  values['model']['num_layers'] = num_layers
  made = program.make(schema.make(values), vocab_size, mesh)
  compiled = program.lower(made).compile()
  analysis: Any = compiled.memory_analysis()
  return Point(
    num_layers,
    batch_size,
    analysis.argument_size_in_bytes,
    memory_lib.temporaries(analysis),
    collectives.count(compiled.as_text() or ''),
    time.perf_counter() - start,
  )


def _process_bytes() -> dict[str, int]:
  """Returns the resident set size of this process in bytes.

  Returns:
    'compiling', its peak until now, and 'compiled', which remains of it.
  """
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  memory_lib.trim()
  path = pathlib.Path('/proc/self/statm')
  left = peak
  if path.exists():
    left = int(path.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  return {'compiling': peak, 'compiled': left}


def main() -> None:
  """Answers the request on standard input."""
  try:
    found = answer(Request(**json.load(sys.stdin)))
  except UserError as error:
    found = {'problems': error.problems}
  print(json.dumps(found))


if __name__ == '__main__':
  main()
