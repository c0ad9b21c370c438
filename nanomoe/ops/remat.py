"""Rematerialization that also works where XLA drops barriers."""

from collections.abc import Callable
from typing import Any

from flax.core import lift
from flax.linen import transforms
import jax
from jax.extend import core


def remat(fn: Callable) -> Callable:
  """Returns `fn`, of which only the arguments are kept for the gradient.

  Parameters and dropout are those of flax.linen.remat. There, an optimization
  barrier delays the recomputation. XLA drops the barrier on CPUs, recomputes
  everything before the backward pass begins, and saves no memory. Here, the
  recomputation depends on the incoming gradient, so that it must wait.

  Args:
    fn: Function `(module, *arrays)` of a Linen module.
  """
  return transforms.lift_transform(_lifted, fn)


def _lifted(fn):
  def inner(scope_fn, repack_fn, variable_groups, rng_groups, *args):
    def rematted(variable_groups, rng_groups, *args):
      scope = scope_fn(variable_groups, rng_groups)
      y = fn(scope, *args)
      return y, repack_fn(scope)

    args = variable_groups, rng_groups, *args
    return _recomputed(rematted, args)(*args)

  return lift.pack(inner, (True,), (True,), (True,), name='remat')


def _recomputed(fn: Callable, args: tuple) -> Callable:
  """Returns `fn(parameters, keys, x, ...)`, whose gradient runs fn again."""
  # fn is traced once: Linen counts the draws from a key, and a second trace
  # would continue the count.
  traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
  out = jax.tree.structure(shapes)

  def run(*args):
    return out.unflatten(core.jaxpr_as_fun(traced)(*jax.tree.leaves(args)))

  def forward(*args):
    return run(*args), args

  def backward(args, gradient):
    params, keys, x, *rest = args
    _, gradient_of = jax.vjp(run, params, keys, _after(x, gradient), *rest)
    return gradient_of(gradient)

  recomputed = jax.custom_vjp(run)
  recomputed.defvjp(forward, backward)
  return recomputed


def _after(x: jax.Array, gradient: Any) -> jax.Array:
  """Returns x, made to depend on the gradient.

  XLA cannot remove `0 * g`, which is not 0 if g is infinite.
  """
  leaves = [g for g in jax.tree.leaves(gradient) if g.dtype == x.dtype]
  return x + sum(0 * g.ravel()[0] for g in leaves if g.size)
