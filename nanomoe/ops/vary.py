"""Values that differ between devices, inside of `jax.shard_map`."""

from collections.abc import Collection

import jax


def vary(x: jax.Array, axes: Collection[str]) -> jax.Array:
  """Returns x, marked as differing along axes of the mesh.

  JAX sums the gradient of a value that is equal on several devices over these
  devices. The mark is where that sum belongs. Both branches of a condition, and
  the values before and after an iteration of a loop, need equal marks.

  Args:
    x: Array.
    axes: Axes of the mesh, for example those of another array.
  """
  missing = tuple(sorted(set(axes) - varying_axes(x)))
  return jax.lax.pcast(x, missing, to='varying') if missing else x


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Returns the axes along which x is marked; none outside of a shard_map."""
  return jax.typeof(x).manual_axis_type.varying
