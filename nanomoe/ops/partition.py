"""Operations that XLA's partitioner cannot divide by itself.

Without these rules the partitioner gathers the operand, and every device does
the whole operation.
"""

import functools

import jax
from jax.experimental import layout
from jax.experimental.custom_partitioning import custom_partitioning
from jaxtyping import Array, Float, Int


def row_major(x: jax.Array) -> jax.Array:
  """Returns x, stored in row-major order on CPUs.

  Each device stores its own part in row-major order.

  Args:
    x: Array of any shape.
  """
  return _row_major(x) if jax.default_backend() == 'cpu' else x


def _constrain_layout(x):
  order = tuple(range(x.ndim))
  return layout.with_layout_constraint(x, layout.Layout(major_to_minor=order))


@custom_partitioning
def _row_major(x):
  return _constrain_layout(x)


def _same_sharding(mesh, operands, results):
  del mesh, results
  return operands[0].sharding


def _divide_row_major(mesh, operands, results):
  del results
  sharding = operands[0].sharding
  return mesh, _constrain_layout, sharding, (sharding,)


_row_major.def_partition(
  partition=_divide_row_major,
  infer_sharding_from_operands=_same_sharding,
  sharding_rule='... -> ...',
)


def highest(
  scores: Float[Array, '*rows n'], k: int
) -> tuple[Float[Array, '*rows k'], Int[Array, '*rows k']]:
  """Returns the k highest scores of each row and their indices, highest first.

  The result is that of `jax.lax.top_k`, without a gradient.

  Args:
    scores: Scores.
    k: Number of scores.
  """
  return _highest(jax.lax.stop_gradient(scores), k)


@functools.partial(custom_partitioning, static_argnums=(1,))
def _highest(scores, k):
  return tuple(jax.lax.top_k(scores, k))


def _divide_highest(k, mesh, operands, results):
  del results
  # Rows are divided as they come; a row stays on one device.
  spec = tuple(operands[0].sharding.spec)
  spec = (*spec, *[None] * (len(operands[0].shape) - len(spec)))[:-1]
  rows = jax.NamedSharding(mesh, jax.P(*spec))

  def run(scores):
    return tuple(jax.lax.top_k(scores, k))

  return mesh, run, (rows, rows), (rows,)


_highest.def_partition(
  partition=_divide_highest,
  sharding_rule='... n -> ... k, ... k',
  need_replication_factors=('n', 'k'),
)
