"""Connections between the devices of several processes, made in advance."""

import itertools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from trainers.runtime import processes


def connect(mesh: Mesh) -> None:
  """Connects the devices of each combination of the axes of a mesh.

  Gloo connects a group of devices at its first collective operation, and fails
  if one process is 30 seconds later than another. A process that compiles a
  program may be that late. Later operations wait for each other much longer.

  Args:
    mesh: Mesh over the CPU devices of all processes. Other backends and single
      processes need no connections.
  """
  if jax.process_count() == 1 or jax.default_backend() != 'cpu':
    return
  everywhere = PartitionSpec(*mesh.axis_names)
  ones = np.ones(mesh.devices.shape, np.float32)
  x = jax.make_array_from_callback(
    ones.shape, NamedSharding(mesh, everywhere), lambda index: ones[index]
  )
  divided = [name for name in mesh.axis_names if mesh.shape[name] > 1]
  groups = itertools.chain.from_iterable(
    itertools.combinations(divided, size + 1) for size in range(len(divided))
  )
  programs = [_sum_over(mesh, names).lower(x).compile() for names in groups]
  in_step = processes.group('connections')
  for program in programs:
    in_step.gather(None)
    jax.block_until_ready(program(x))


def _sum_over(mesh: Mesh, names: tuple[str, ...]) -> jax.stages.Wrapped:
  """Returns a program that sums an array of the mesh's shape over axes."""
  left = [None if name in names else name for name in mesh.axis_names]
  return jax.jit(
    jax.shard_map(
      lambda x: jax.lax.psum(x, names),
      mesh=mesh,
      in_specs=PartitionSpec(*mesh.axis_names),
      out_specs=PartitionSpec(*left),
    )
  )
