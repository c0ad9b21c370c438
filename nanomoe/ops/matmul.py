"""Matrix products: all of them run here, in the precision of the config."""

import functools
import pathlib

import jax
import jax.numpy as jnp

from nanomoe.ops.partition import row_major

PRECISIONS = ('float32', 'bfloat16')

# Without it, GPUs round float32 operands to TF32.
_EXACT = jax.lax.Precision.HIGHEST

# CPUs whose matrix units multiply bfloat16 and add float32.
_BFLOAT16_FLAGS = {'amx_bf16', 'avx512_bf16'}


def resolve_precision(precision: str) -> str:
  """Returns the fastest precision of this machine for 'auto', else `precision`.

  Args:
    precision: Value of the config key `precision`.
  """
  if precision != 'auto':
    return precision
  if jax.default_backend() != 'cpu':
    return 'bfloat16'
  return 'bfloat16' if _BFLOAT16_FLAGS & _cpu_flags() else 'float32'


def _cpu_flags() -> set[str]:
  """Returns the names of this CPU's features; none if they are unknown."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:  # Only Linux has this file.
    return set()
  return set(next((x for x in lines if x.startswith('flags')), '').split())


def einsum(
  subscripts: str,
  x: jax.Array,
  w: jax.Array,
  precision: str,
  bias: jax.Array | None = None,
) -> jax.Array:
  """Returns the einsum of two operands, plus a bias, in float32.

  The gradients are float32 too.

  Args:
    subscripts: Subscripts such as 'nd,df->nf'. Each index is in two of the
      three terms.
    x: First operand, of any shape.
    w: Second operand, of any shape.
    precision: 'bfloat16' rounds operands, also those of the gradient's
      products, to 8 bits of mantissa and adds in float32; 'float32' rounds
      nothing.
    bias: Array that is added, without the result's last index but one, or None.
      Its gradient sums the rounded gradient that the products multiply, so that
      XLA need not write the result's gradient in both formats.
  """
  return _dot(subscripts, x, w, precision, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _dot(subscripts, x, w, precision, bias):
  y = _einsum(subscripts, x, w, precision)
  return y if bias is None else y + bias[..., None, :]


def _einsum(subscripts, x, w, precision):
  if precision == 'float32':
    return jnp.einsum(subscripts, x, w, precision=_EXACT)
  x, w = rounded(x, precision), rounded(w, precision)
  return jnp.einsum(subscripts, x, w, preferred_element_type=jnp.float32)


def _forward(subscripts, x, w, precision, bias):
  # Operands are rounded once: the backward pass needs no other copy.
  x16, w16 = rounded(x, precision), rounded(w, precision)
  y = _dot(subscripts, x16, w16, precision, bias)
  likes = jnp.zeros((), x.dtype), jnp.zeros((), w.dtype)
  return y, (x16, w16, *likes, bias)


def _backward(subscripts, precision, residuals, g):
  x, w, x_like, w_like, bias = residuals
  dx, dw, db = gradients(subscripts, x, w, g, precision)
  return (
    dx.astype(x_like.dtype),
    dw.astype(w_like.dtype),
    None if bias is None else db.astype(bias.dtype),
  )


def rounded(x: jax.Array, precision: str) -> jax.Array:
  """Returns x in the format that products of this precision read.

  Args:
    x: Operand.
    precision: Precision of the product.
  """
  return x.astype(jnp.bfloat16) if precision == 'bfloat16' else x


def gradients(
  subscripts: str, x: jax.Array, w: jax.Array, g: jax.Array, precision: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of an einsum with respect to x, w and the bias.

  Args:
    subscripts: Subscripts of the einsum.
    x: Its first operand.
    w: Its second operand, rounded.
    g: Gradient with respect to its result.
    precision: Precision of the products.
  """
  operands, out = subscripts.split('->')
  x_index, w_index = operands.split(',')
  einsum = functools.partial(_einsum, precision=precision)
  x = rounded(x, precision)
  # XLA's CPU products read a transposed operand as float32.
  g = row_major(rounded(g, precision))
  dx = einsum(f'{out},{w_index}->{x_index}', g, w)
  # XLA's fast product on CPUs needs a left operand summed over its last axis.
  # Both operands are summed over their rows here, so the smaller one is
  # transposed. Without an explicit layout, XLA undoes the transposition.
  left, right = sorted(((x_index, x), (out, g)), key=lambda o: o[1].size)
  order = sorted(left[0], key=lambda i: (i not in w_index, w_index.find(i)))
  rows = row_major(left[1].transpose([left[0].index(i) for i in order]))
  dw_index = [i for i in order if i in w_index]
  dw_index += [i for i in right[0] if i in w_index and i not in order]
  dw = einsum(
    f'{"".join(order)},{right[0]}->{"".join(dw_index)}', rows, right[1]
  )
  dw = row_major(dw).transpose([dw_index.index(i) for i in w_index])
  # Without a last layout, a program may return the array in the order of the
  # transposed one, and JAX assumes that it is row-major.
  dw = row_major(dw)
  return dx, dw, jnp.sum(g, axis=-2, dtype=jnp.float32)


def row_sums(x: jax.Array) -> jax.Array:
  """Returns the sums over the last axis, as a product with a vector of ones.

  XLA joins a sum over the last axis with the products before it, which made it
  up to 20 times as slow on CPUs.

  Args:
    x: Rows, `float32[..., rows, d]`.
  """
  return jnp.einsum(
    '...d,d->...', x, jnp.ones(x.shape[-1:], x.dtype), precision=_EXACT
  )


_dot.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ragged_dot(
  x: jax.Array,
  w: jax.Array,
  bias: jax.Array | None,
  sizes: jax.Array,
  precision: str,
) -> jax.Array:
  """Returns each row times its group's matrix, plus the group's bias.

  Args:
    x: Rows, `float32[rows, d]`, sorted by group.
    w: Matrices, `float32[groups, d, f]`.
    bias: Biases, `float32[groups, f]`, or None.
    sizes: Number of rows of each group, `int32[groups]`. They add up to the
      number of rows.
    precision: Precision of the products, as in `einsum`.

  Returns:
    The products, `float32[rows, f]`.
  """
  y = _ragged(x, w, sizes, _WEIGHTS, precision)
  if bias is None:
    return y
  group = jnp.sum(jnp.arange(len(x))[:, None] >= jnp.cumsum(sizes)[:-1], axis=1)
  return y + bias[group]


# Dimension numbers of ragged products. The first sums over the columns of x,
# the second over the rows of a group.
_WEIGHTS = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])


def _ragged(x, y, sizes, dimensions, precision):
  return jax.lax.ragged_dot_general(
    rounded(x, precision),
    rounded(y, precision),
    sizes,
    dimensions,
    precision=_EXACT if precision == 'float32' else None,
    preferred_element_type=jnp.float32,
  )


def _ragged_forward(x, w, bias, sizes, precision):
  # Operands are rounded once, as in `_forward`.
  x, w = rounded(x, precision), rounded(w, precision)
  return ragged_dot(x, w, bias, sizes, precision), (x, w, bias, sizes)


def _ragged_backward(precision, residuals, g):
  x, w, bias, sizes = residuals
  g = rounded(g, precision)
  dx = _ragged(g, w.swapaxes(1, 2), sizes, _WEIGHTS, precision)
  dw = _ragged(x, g, sizes, _ROWS, precision)
  if bias is None:
    return dx, dw, None, None
  # A sum of rows by group would be a scatter-add, so this is a product too.
  db = _ragged(jnp.ones((len(x), 1)), g, sizes, _ROWS, precision)
  return dx, dw, db[:, 0], None


ragged_dot.defvjp(_ragged_forward, _ragged_backward)
