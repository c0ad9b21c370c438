"""Floating-point work of the matrix products in a traced program: exact."""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def count(fn: Callable[..., Any], *args: Any, trips: int | None = None) -> int:
  """Returns 2 * multiply-adds of the products that fn(*args) needs, as traced.

  A product whose result is not used does not count, because XLA removes it. A
  ragged product counts each row by its own group's matrix; a backend may
  compute more. The body of a scan counts as often as it runs, and a conditional
  counts as its most expensive branch. The body of a `shard_map` counts for each
  device of the axes that it makes manual: the result is that of the whole mesh.

  Args:
    fn: Function that JAX can trace.
    *args: Its arguments, arrays or their shapes.
    trips: Iterations of a loop of unknown length, such as the loop over the
      overflow of `dropless`; None if there is none with products.

  Raises:
    ValueError: `trips` is None, and a loop of unknown length has products.
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr, trips)


def _count(jaxpr: Any, trips: int | None) -> int:
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return sum(_count_equation(e, trips) for e in used.eqns)


def _count_equation(equation: Any, trips: int | None) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    return _dot(equation)
  if name == 'ragged_dot_general':
    return _ragged_dot(equation)
  inner = [_count(j, trips) for j in _jaxprs(params)]
  if name == 'cond':
    return max(inner)
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'shard_map':
    sizes = params['mesh'].shape
    return math.prod(sizes[a] for a in params['newly_manual_axes']) * sum(inner)
  if name == 'while' and sum(inner):
    if trips is None:
      raise ValueError('products in a loop of unknown length')
    return trips * sum(inner)
  return sum(inner)


def _dot(equation: Any) -> int:
  (contracted, _), (batch, _) = equation.params['dimension_numbers']
  left, right = (v.aval for v in equation.invars)
  if not left.size:
    return 0
  shared = math.prod(left.shape[i] for i in (*contracted, *batch))
  batches = math.prod(left.shape[i] for i in batch)
  free_left = left.size // shared
  free_right = right.size // shared
  depth = shared // batches
  return 2 * batches * depth * free_left * free_right


def _ragged_dot(equation: Any) -> int:
  dimensions = equation.params['ragged_dot_dimension_numbers']
  (_, contracted), _ = dimensions.dot_dimension_numbers
  left, right, _ = (v.aval for v in equation.invars)
  shared = (*contracted, *dimensions.rhs_group_dimensions)
  return 2 * left.size * right.size // math.prod(right.shape[i] for i in shared)


def _jaxprs(params: dict[str, Any]):
  for value in jax.tree.leaves(
    list(params.values()),
    is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
  ):
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
