"""Table of all dispatches, by name."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax

from nanomoe.config.overrides import Config
from nanomoe.moe.dispatch.capacity import capacity
from nanomoe.moe.dispatch.dense import dense
from nanomoe.moe.dispatch.dropless import dropless
from nanomoe.moe.dispatch.grouped import grouped
from nanomoe.moe.dispatch.interface import DispatchFn


class Dispatch(NamedTuple):
  """Entry of the table.

  Attributes:
    fn: A `DispatchFn`, once the arguments named in `keys` are given to it.
    causal: Whether a token's output depends on that token's routing alone. The
      model is then causal if its router is.
    keys: Keys of the config section `moe` that are arguments of `fn`.
  """

  fn: Callable[..., Any]
  causal: bool = True
  keys: tuple[str, ...] = ()


DISPATCH = {
  'dense': Dispatch(dense),
  'dropless': Dispatch(dropless),
  'capacity': Dispatch(capacity, causal=False, keys=('capacity_factor',)),
  'grouped': Dispatch(grouped),
}


def build(name: str, moe: Mapping[str, Any]) -> DispatchFn:
  """Returns the dispatch `name` with its arguments from the config.

  The function is jitted by itself, so that it is traced and lowered once for
  all layers.

  Args:
    name: Key of `DISPATCH`.
    moe: Config section `moe`.
  """
  fn, _, keys = DISPATCH[name]
  with_arguments = functools.partial(fn, **{key: moe[key] for key in keys})
  return jax.jit(with_arguments, static_argnums=3)


def eval_dispatch(config: Config) -> str:
  """Returns the name of the dispatch of evaluation and generation."""
  return config.moe.eval_dispatch or config.moe.dispatch


def resolve_dispatch(name: str) -> str:
  """Returns the dispatch that 'auto' stands for; other names are unchanged.

  'auto' stands for the fastest dispatch of the backend that drops no token.
  """
  if name != 'auto':
    return name
  return 'dropless' if jax.default_backend() == 'cpu' else 'grouped'
