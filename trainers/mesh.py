"""Meshes of devices, and where arrays are placed on them.

A run always has a mesh. One device is a mesh of size 1, with the same program.
The engine is JAX's own: arrays have shardings, and XLA's partitioner divides
the program.
"""

from collections.abc import Callable, Mapping, Sequence
import logging
import math
import re
from typing import Any

import jax
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)
import numpy as np

from trainers.checkpoint import arrays as arrays_lib
from trainers.errors import UserError
from trainers.runtime import connections
from trainers.state import TrainState
from trainers.task import Batch

log = logging.getLogger(__name__)

# Axes of every mesh. A batch's rows are divided over the first three:
#   data    copies of the parameters,
#   fsdp    parts of the parameters, which are gathered where they are used,
#   expert  parts of the experts, to which tokens travel,
#   tensor  parts of matrices, of which each device computes its own products.
AXES = ('data', 'fsdp', 'expert', 'tensor')
BATCH_AXES = AXES[:3]

# Replicated arrays of this size or more are reported on a mesh that could
# divide them.
LARGE_BYTES = 1 << 20

# Mesh axis of each array axis of a parameter, given its path and shape.
AxesOf = Callable[[str, tuple[int, ...]], tuple[str | None, ...]]


def mesh_shape(
  sizes: Mapping[str, int] | None, num_devices: int
) -> tuple[int, ...]:
  """Returns the size of each axis of `AXES`, with -1 replaced.

  Args:
    sizes: As of `make_mesh`.
    num_devices: Number of devices, which -1 uses.

  Raises:
    UserError: Several axes are -1, or -1 does not fit.
  """
  shape = [(sizes or {}).get(axis, 1) for axis in AXES]
  given = _shown(shape)
  if shape.count(-1) > 1:
    raise UserError(f'{given}: only one axis may be -1')
  if -1 in shape:
    others = -math.prod(shape)
    if num_devices % others:
      raise UserError(
        f'{given}: the product of the other axes is {others}; it must divide '
        f'the number of devices, {num_devices}'
      )
    shape[shape.index(-1)] = num_devices // others
  return tuple(shape)


def _shown(shape: Sequence[int]) -> str:
  return ' '.join(
    f'mesh.{axis}={size}'
    for axis, size in zip(AXES, shape, strict=True)
    if size != 1
  )


def make_mesh(sizes: Mapping[str, int] | None = None) -> Mesh:
  """Returns a mesh over the first devices, sorted by process.

  All processes of a run call it together.

  Args:
    sizes: Size of each axis of `AXES`; missing ones are 1, and one may be -1,
      which uses all devices. None makes a mesh of one device.

  Raises:
    UserError: There are not as many devices, -1 does not fit, or a mesh of
      several processes leaves out devices.
  """
  devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  shape = mesh_shape(sizes, len(devices))
  size = math.prod(shape)
  if size > len(devices):
    on_cpu = jax.default_backend() == 'cpu'
    hint = f'; JAX_NUM_CPU_DEVICES={size} makes as many on a CPU'
    raise UserError(
      f'{_shown(shape)}: the mesh has {size} places, but the number of devices '
      f'is {len(devices)}{hint if on_cpu else ""}'
    )
  if size < len(devices) and jax.process_count() > 1:
    raise UserError(
      f'{_shown(shape) or "mesh.data=1"}: the size of the mesh is {size}, but '
      f'the {jax.process_count()} processes have {len(devices)} devices; it '
      'must use all of them, as mesh.data=-1 does'
    )
  mesh = Mesh(
    np.array(devices[:size]).reshape(shape),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )
  connections.connect(mesh)
  return mesh


def make_abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
  """Returns a mesh without devices, for shapes and traces of any size.

  Args:
    sizes: Size of each axis of `AXES`, none of them -1; missing ones are 1.
  """
  return AbstractMesh(
    tuple(sizes.get(axis, 1) for axis in AXES),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
  )


def num_batch_parts(mesh: Mesh | AbstractMesh) -> int:
  """Returns the number of parts into which a batch's rows are divided."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def row_constraint(
  mesh: Mesh | AbstractMesh | None,
) -> Callable[[jax.Array], jax.Array]:
  """Returns a function that keeps activations divided by rows alone.

  Without it, activations may take on the sharding of a parameter, and the
  partitioner has to copy them whole to every device.

  Args:
    mesh: Mesh of the run; None, or one of size 1, makes the identity.

  Returns:
    Function of an array, which leaves arrays alone whose rows do not divide.
  """
  if mesh is None or mesh.size == 1:
    return lambda x: x
  sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
  parts = num_batch_parts(mesh)

  def constrain(x):
    if len(x) % parts:
      return x
    return jax.lax.with_sharding_constraint(x, sharding)

  return constrain


class Placement:
  """Shardings of a run's arrays.

  Args:
    mesh: Mesh of the run; None makes one of a single device. An abstract mesh
      serves shapes alone.
    axes_of: Mesh axes of a parameter. Axes that do not divide the array are
      dropped. None replicates all parameters.

  Attributes:
    mesh: Mesh of the run.
    replicated: Sharding of arrays that every device has whole.
    batch: Sharding of a batch's arrays.
  """

  def __init__(
    self,
    mesh: Mesh | AbstractMesh | None = None,
    axes_of: AxesOf | None = None,
  ):
    self.mesh = mesh or make_mesh()
    self.replicated = NamedSharding(self.mesh, PartitionSpec())
    self.batch = NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
    self._axes_of = axes_of or (lambda path, shape: (None,) * len(shape))

  def axes(self, path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Returns the mesh axis of each axis of a parameter, where it divides.

    Args:
      path: Names from the root to the parameter, joined by '/'.
      shape: Shape of the parameter.
    """
    return tuple(
      axis if axis and size % self.mesh.shape[axis] == 0 else None
      for axis, size in zip(self._axes_of(path, shape), shape, strict=True)
    )

  def shardings(self, state: TrainState) -> TrainState:
    """Returns a tree like `state` of shardings.

    An array of the optimizer, the average or the model state whose path ends
    with the path of a parameter is divided as the parameter is. A factor of
    Adafactor, which lacks one of the parameter's axes, is divided along the
    others. All other arrays are replicated.

    Args:
      state: State or its shapes.
    """
    shapes = {
      name: leaf.shape
      for name, leaf in arrays_lib.flatten_by_name(state.params).items()
    }

    def sharding(path, leaf):
      names = jax.tree_util.keystr(path, simple=True, separator='.').split('.')
      suffixes = ('.'.join(names[i:]) for i in range(1, len(names)))
      name = next((s for s in suffixes if s in shapes), None)
      if name is None:
        return self.replicated
      axes = self.axes(name.replace('.', '/'), shapes[name])
      axes = _without_reduced_axis(axes, shapes[name], leaf.shape)
      return NamedSharding(self.mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding, state)

  def abstract(self, tree: Any, shardings: Any = None) -> Any:
    """Returns shapes with shardings.

    Args:
      tree: Tree of arrays or shapes.
      shardings: Tree like `tree` of shardings; None replicates all arrays.
    """
    if shardings is None:
      shardings = jax.tree.map(lambda _: self.replicated, tree)
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      shardings,
    )

  def rows(self, batch_size: int) -> slice:
    """Returns the rows of a global batch that this process reads.

    Processes that hold parts of the same matrices read the same rows.

    Args:
      batch_size: Number of rows of the global batch.
    """
    if jax.process_count() == 1:
      return slice(0, batch_size)
    parts = self.batch.addressable_devices_indices_map((batch_size,))
    bounds = [part[0].indices(batch_size) for part in parts.values() if part]
    # Devices are sorted by process, so the rows of a process are neighbours.
    return slice(min(b[0] for b in bounds), max(b[1] for b in bounds))

  def put(self, tree: Any, shardings: Any = None) -> Any:
    """Returns arrays on the mesh.

    Args:
      tree: Tree of arrays, equal on all processes.
      shardings: Tree like `tree` of shardings; None replicates all arrays.
    """
    if jax.process_count() == 1:
      return jax.device_put(
        tree, self.replicated if shardings is None else shardings
      )
    if shardings is None:
      shardings = jax.tree.map(lambda _: self.replicated, tree)
    return jax.tree.map(_put_globally, tree, shardings)

  def put_batch(self, batch: Batch) -> Batch:
    """Returns a batch on the mesh, its rows divided over the batch axes.

    Args:
      batch: Rows that `rows` gives to this process.
    """
    if jax.process_count() == 1:
      return jax.device_put(dict(batch), self.batch)
    num_parts = num_batch_parts(self.mesh)
    own = self.batch.addressable_devices_indices_map((num_parts,))
    num_own = len({part[0].indices(num_parts) for part in own.values() if part})
    return {
      name: jax.make_array_from_process_local_data(
        self.batch, x, (len(x) * num_parts // num_own, *x.shape[1:])
      )
      for name, x in jax.tree.map(np.asarray, dict(batch)).items()
    }

  def report(self, params: Any) -> None:
    """Logs the mesh, axes that were dropped, and large replicated arrays.

    Args:
      params: Parameters or their shapes.
    """
    if self.mesh.size == 1:
      return
    sizes = {axis: n for axis, n in self.mesh.shape.items() if n > 1}
    shown = ' x '.join(f'{axis} {n}' for axis, n in sizes.items())
    log.info('mesh: %s', shown)
    dropped, large = {}, {}
    for name, leaf in arrays_lib.flatten_by_name(params).items():
      path = name.replace('.', '/')
      axes = self.axes(path, leaf.shape)
      kind = re.sub(r'\d+', 'N', path)  # One line for all blocks.
      for axis, wanted in zip(
        axes, self._axes_of(path, leaf.shape), strict=True
      ):
        if wanted in sizes and axis is None:
          dropped[kind, wanted] = leaf.shape
      num_bytes = leaf.size * leaf.dtype.itemsize
      is_divided = any(axis in sizes for axis in axes)
      if num_bytes >= LARGE_BYTES and not is_divided:
        large[path] = num_bytes
    for (kind, axis), shape in dropped.items():
      log.info(
        '%s %s is not divided over %s: no multiple of %d',
        kind,
        list(shape),
        axis,
        sizes[axis],
      )
    if sizes.keys() & {'fsdp', 'expert'}:
      for path, num_bytes in large.items():
        log.warning(
          '%s, %.1f MB, is on every device whole', path, num_bytes / 1e6
        )


def _put_globally(x: Any, sharding: NamedSharding) -> jax.Array:
  """Returns an array on devices of several processes.

  `jax.device_put` would refuse keys, and compare other values on all processes
  each time.

  Args:
    x: Array on the devices of all processes, or value that all processes have.
    sharding: Sharding of the result.
  """
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    if x.sharding.is_equivalent_to(sharding, x.ndim):
      return x
    return jax.jit(lambda x: x, out_shardings=sharding)(x)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = _put_globally(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=str(jax.random.key_impl(x)))
  values = np.asarray(x)
  return jax.make_array_from_callback(
    values.shape, sharding, lambda index: values[index]
  )


def _without_reduced_axis(
  axes: tuple[str | None, ...], shape: tuple[int, ...], found: tuple[int, ...]
) -> tuple[str | None, ...]:
  """Returns the axes of an array of shape `found`, made of a parameter.

  Args:
    axes: Mesh axis of each axis of the parameter.
    shape: Shape of the parameter.
    found: Shape of the parameter, or that shape without one axis; other shapes
      are not divided.
  """
  if found == shape:
    return axes
  for i in range(len(shape)):
    if found == shape[:i] + shape[i + 1 :]:
      return axes[:i] + axes[i + 1 :]
  return (None,) * len(found)
