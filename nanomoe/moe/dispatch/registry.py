"""Table of all dispatches, by name."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from nanomoe.config import schema
from nanomoe.moe.dispatch import exchange
from nanomoe.moe.dispatch.capacity import capacity
from nanomoe.moe.dispatch.dense import dense
from nanomoe.moe.dispatch.dropless import dropless
from nanomoe.moe.dispatch.grouped import grouped
from nanomoe.moe.dispatch.interface import DispatchFn
from trainers.mesh import num_batch_parts


class Dispatch(NamedTuple):
  """Entry of the table.

  Attributes:
    fn: A `DispatchFn`, once the arguments named in `keys` are given to it.
    causal: Whether a token's output depends on that token's routing alone. The
      model is then causal if its router is.
    keys: Keys of the config section `moe` that are arguments of `fn`.
    is_local: Whether the tokens of each device may be dispatched by
      themselves.
    expects: Whether `fn` takes `num_expected`; see `exchange.divided`.
  """

  fn: Callable[..., Any]
  causal: bool = True
  keys: tuple[str, ...] = ()
  is_local: bool = True
  expects: bool = False


DISPATCH = {
  'dense': Dispatch(dense),
  'dropless': Dispatch(dropless, expects=True),
  # The capacity is of the whole batch.
  'capacity': Dispatch(capacity, False, ('capacity_factor',), is_local=False),
  'grouped': Dispatch(grouped),
}


def build(
  name: str, moe: Mapping[str, Any], mesh: Mesh | AbstractMesh | None = None
) -> DispatchFn:
  """Returns the dispatch `name` with its arguments from the config.

  The function is jitted by itself, so that it is traced and lowered once for
  all layers.

  Args:
    name: Key of `DISPATCH`.
    moe: Config section `moe`.
    mesh: Mesh of the run; None for one device.
  """
  fn, _, keys, is_local, expects = DISPATCH[name]
  with_arguments = functools.partial(fn, **{key: moe[key] for key in keys})
  if mesh is not None and is_local and num_batch_parts(mesh) > 1:
    with_arguments = exchange.divided(
      with_arguments, mesh, moe['exchange'], expects=expects
    )
  return jax.jit(with_arguments, static_argnums=3)


def eval_dispatch(moe: schema.MoE) -> str:
  """Returns the name of the dispatch of evaluation and generation.

  Args:
    moe: Config section `moe`.
  """
  return moe.eval_dispatch or moe.dispatch


def resolve_dispatch(name: str) -> str:
  """Returns the dispatch that 'auto' stands for; other names are unchanged.

  'auto' stands for the fastest dispatch of the backend that drops no token.
  """
  if name != 'auto':
    return name
  return 'dropless' if jax.default_backend() == 'cpu' else 'grouped'
