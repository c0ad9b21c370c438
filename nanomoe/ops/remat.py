"""Rematerialisation that also holds where XLA drops barriers."""

from collections.abc import Callable
from typing import Any

from flax.core import lift
from flax.linen import transforms
import jax
from jax.extend import core


def remat(fn: Callable) -> Callable:
  """fn(module, *arrays), of which only the arguments are kept for the gradient.

  As flax.linen.remat; the parameters and the dropout are the same. That one
  leaves the order to an optimization barrier. XLA drops it on CPUs, computes
  everything again before the backward pass begins, and saves no memory. Here
  what is computed again depends on the incoming gradient, so it must wait.
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
  """fn(parameters, keys, x, ...) with a gradient that runs fn again."""
  # Traced once: Linen counts what is drawn from a key, and goes on counting.
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
  """x, once the gradient is known: XLA may not take 0 * float for 0."""
  leaves = [g for g in jax.tree.leaves(gradient) if g.dtype == x.dtype]
  return x + sum(0 * g.ravel()[0] for g in leaves if g.size)
