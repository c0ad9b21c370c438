"""Every way for tokens to reach their experts, by name."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax

from nanomoe.moe.dispatch.capacity import capacity
from nanomoe.moe.dispatch.dropless import dense, dropless
from nanomoe.moe.dispatch.grouped import grouped
from trainers.metrics import Mean

DispatchFn = Callable[..., tuple[jax.Array, dict[str, Mean]]]


class Dispatch(NamedTuple):
  """One of them.

  Attributes:
    combine: (x, routing, experts, precision, **keys) -> (y, metrics).
    causal: what a token gets depends on its own routing alone, so never on
      later tokens or other sequences, if the router does not.
    keys: of the config's section `moe` that `combine` takes.
  """

  fn: DispatchFn
  causal: bool = True
  keys: tuple[str, ...] = ()


DISPATCH = {
  'dense': Dispatch(dense),
  'dropless': Dispatch(dropless),
  'capacity': Dispatch(capacity, causal=False, keys=('capacity_factor',)),
  'grouped': Dispatch(grouped),
}


def build(name: str, moe: Mapping[str, Any]) -> DispatchFn:
  """(x, routing, experts, precision) -> (y, metrics), as `moe` says.

  Jitted by itself: traced and lowered for one layer, not for each.
  """
  combine, _, keys = DISPATCH[name]
  own = functools.partial(combine, **{key: moe[key] for key in keys})
  return jax.jit(own, static_argnums=3)


def resolve_dispatch(dispatch: str) -> str:
  """'auto' -> what suits the backend and drops no token; others as they are."""
  if dispatch != 'auto':
    return dispatch
  return 'dropless' if jax.default_backend() == 'cpu' else 'grouped'
