"""Exchange of tokens or experts between the devices of a mesh.

Each device dispatches its own rows of the batch. Routing, losses and statistics
are outside: they are of the whole batch. Every exchange is exact and drops no
token.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from nanomoe.moe.dispatch.interface import DispatchFn, dispatch_metrics
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from nanomoe.ops import permute
from nanomoe.ops.vary import vary
from trainers.mesh import BATCH_AXES, num_batch_parts
from trainers.metrics import Mean

# Room of a pair of devices in a round of `all_to_all`, over the balanced load.
ROOM_FACTOR = 1.25

# Function (x, expert, weight, experts, precision, num_expected) -> y, of the
# rows of one device. num_expected is the number of its balanced assignments.
LocalFn = Callable[..., jax.Array]


def divided(
  dispatch: DispatchFn,
  mesh: Mesh | AbstractMesh,
  exchange: str,
  *,
  expects: bool,
) -> DispatchFn:
  """Returns a dispatch of rows that are divided over a mesh.

  Rows that do not divide, such as those of a single token, are dispatched
  undivided.

  Args:
    dispatch: Dispatch of the rows of one device.
    mesh: Mesh with more than one part of a batch.
    exchange: Key of `EXCHANGES`, or 'auto', which moves the fewest bytes.
    expects: Whether `dispatch` takes `num_expected`, the number of assignments
      that are not empty if loads are balanced.
  """

  def local(x, expert, weight, experts, precision, num_expected):
    options = {'num_expected': num_expected} if expects else {}
    num_experts = experts.w_in.shape[0]
    routing = _routing(expert, weight, num_experts)
    return dispatch(x, routing, experts, precision, **options)[0]

  def run(
    x: Float[Array, 'tokens d_model'],
    routing: Routing,
    experts: Experts,
    precision: str,
  ) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
    parts = num_batch_parts(mesh)
    if len(x) % parts:
      return dispatch(x, routing, experts, precision)
    name = exchange
    if name == 'auto':
      matrices = [experts.w_in, experts.w_gate, experts.w_out]
      name = choose(
        mesh.shape,
        num_tokens=len(x) // parts,
        top_k=routing.expert.shape[1],
        d_model=x.shape[1],
        num_weights=sum(w.size for w in matrices if w is not None),
      )
    rows = PartitionSpec(BATCH_AXES)
    # XLA divides along the tensor axis, inside too.
    manual = BATCH_AXES if mesh.shape['tensor'] > 1 else mesh.axis_names
    of_experts = PartitionSpec(None if name == 'experts' else 'expert')
    y = jax.shard_map(
      functools.partial(EXCHANGES[name], local, precision),
      mesh=mesh,
      in_specs=(rows, rows, rows, of_experts),
      out_specs=rows,
      axis_names=set(manual),
    )(x, routing.expert, routing.weight, experts)
    return y, dispatch_metrics(routing)

  return run


def choose(
  sizes: Mapping[str, int],
  *,
  num_tokens: int,
  top_k: int,
  d_model: int,
  num_weights: int,
) -> str:
  """Returns the exchange that moves the fewest bytes.

  Args:
    sizes: Size of each axis of the mesh.
    num_tokens: Number of tokens of a device.
    top_k: Number of experts of a token.
    d_model: Width of the residual stream.
    num_weights: Number of weights in the matrices of a layer's experts.
  """
  moved = moved_numbers(
    sizes['expert'],
    num_tokens=num_tokens,
    top_k=top_k,
    d_model=d_model,
    num_weights=num_weights,
  )
  return min(moved, key=lambda name: moved[name])


def moved_numbers(
  parts: int, *, num_tokens: int, top_k: int, d_model: int, num_weights: int
) -> dict[str, int]:
  """Returns how many numbers a device receives in a layer and step.

  Forward and backward are counted, with balanced loads.

  Args:
    parts: Size of the expert axis.
    num_tokens: Number of tokens of a device.
    top_k: Number of experts of a token.
    d_model: Width of the residual stream.
    num_weights: Number of weights in the matrices of a layer's experts.

  Returns:
    {exchange: numbers}, simplest exchange first.
  """
  # Experts are gathered, and their gradients are summed.
  experts = 2 * (parts - 1) * (num_weights // parts)
  # Tokens go and come back, and so do their gradients.
  tokens = 4 * (parts - 1) * d_model
  return {
    'experts': experts,
    'tokens': tokens * num_tokens,
    'all_to_all': tokens * room(num_tokens, top_k, parts),
  }


def room(num_tokens: int, top_k: int, parts: int) -> int:
  """Returns how many tokens a device sends to another in one round.

  Args:
    num_tokens: Number of tokens of a device.
    top_k: Number of experts of a token.
    parts: Size of the expert axis.
  """
  balanced = num_tokens * top_k / parts
  return min(math.ceil(ROOM_FACTOR * balanced), num_tokens)


def _with_own_tokens(local, precision, x, expert, weight, experts):
  """Dispatches a device's tokens to all experts."""
  experts = _varied(experts)
  return local(x, expert, weight, experts, precision, expert.size)


def _with_own_experts(local, precision, x, expert, weight, experts):
  """Dispatches the tokens of all devices to a device's experts."""
  gather = functools.partial(jax.lax.all_gather, axis_name='expert', tiled=True)
  experts = _varied(experts)
  own = _own_expert(gather(expert), experts)
  y = local(gather(x), own, gather(weight), experts, precision, expert.size)
  return jax.lax.psum_scatter(y, 'expert', tiled=True)


def _varied(experts):
  return jax.tree.map(lambda w: vary(w, BATCH_AXES), experts)


def _own_expert(expert, experts):
  """Returns experts as numbers of this device; those of others are empty."""
  num_own = experts.w_in.shape[0]
  own = expert - num_own * jax.lax.axis_index('expert')
  return jnp.where((own >= 0) & (own < num_own), own, num_own)


def _with_all_to_all(local, precision, x, expert, weight, experts):
  """Sends each token to the devices of its experts, in rounds.

  A token is sent once to a device, whatever the number of its experts there. A
  pair of devices has room for `ROOM_FACTOR` times the balanced load in a round.
  There are as many rounds as the fullest pair needs, one if loads are nearly
  balanced. The bytes of a round do not depend on the size of the axis.
  """
  parts = jax.lax.axis_size('expert')
  experts = _varied(experts)
  num_own = experts.w_in.shape[0]
  # [tokens, parts]: whether the token has an expert there.
  goes = jnp.any(expert[:, :, None] // num_own == jnp.arange(parts), axis=1)
  rank = jnp.cumsum(goes, axis=0, dtype=jnp.int32) - goes
  num_room = room(len(x), expert.shape[1], parts)
  fullest = jnp.max(jnp.sum(goes, axis=0, dtype=jnp.int32))
  # All devices take part in each round.
  num_rounds = jax.lax.pmax(-(-fullest // num_room), BATCH_AXES)
  rank = jnp.where(goes, rank, num_room * num_rounds)
  run = _Round(local, precision, num_room)
  return _run_rounds(run, x, weight, experts, expert, rank, num_rounds)


class _Round:
  """Differentiable function of one round of `_with_all_to_all`.

  Args:
    local: Dispatch of a device's rows.
    precision: Precision of the products.
    num_room: Room of each pair of devices.
  """

  def __init__(self, local: LocalFn, precision: str, num_room: int):
    self._local = local
    self._precision = precision
    self._num_room = num_room

  def __call__(
    self,
    x: Float[Array, 'tokens d_model'],
    weight: Float[Array, 'tokens k'],
    experts: Experts,
    expert: Int[Array, 'tokens k'],
    rank: Int[Array, 'tokens parts'],
    index: Int[Array, ''] | int,
  ) -> Float[Array, 'tokens d_model']:
    """Returns the combined output of the assignments of one round.

    Args:
      x: Activations of this device's tokens.
      weight: Weight of each assignment.
      experts: This device's experts.
      expert: Experts of the tokens; one past the last expert is empty.
      rank: Place of each token among those that go to a device; a token that
        does not go there has a place after the last round.
      index: Index of the round.
    """
    size, parts = self._num_room, rank.shape[1]
    place = rank - index * size
    slot = jnp.where(
      (place >= 0) & (place < size),
      place + size * jnp.arange(parts),
      size * parts,
    )  # [tokens, parts]
    token = permute.invert_slots(slot, size * parts) // parts  # [slots]
    sent = jnp.take(
      expert,
      token,
      axis=0,
      mode='fill',
      fill_value=parts * experts.w_in.shape[0],
    )
    y = self._local(
      _exchange(permute.permute(x, token, slot), parts),
      _own_expert(_exchange(sent, parts), experts),
      _exchange(permute.permute(weight, token, slot), parts),
      experts,
      self._precision,
      expert.size,
    )
    return permute.permute(_exchange(y, parts), slot, token[:, None])


def _exchange(rows: jax.Array, parts: int) -> jax.Array:
  """Sends the i-th part of the rows to device i of the expert axis."""
  by_device = rows.reshape(parts, -1, *rows.shape[1:])
  return jax.lax.all_to_all(by_device, 'expert', 0, 0).reshape(rows.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_rounds(run, x, weight, experts, expert, rank, num_rounds):
  """Returns the sum of all rounds. JAX cannot reverse a loop of any length."""
  arguments = run, x, weight, experts, expert, rank, num_rounds
  return _forward(*arguments)[0]


def _forward(run, x, weight, experts, expert, rank, num_rounds):
  def run_round(index, x, weight, experts):
    return run(x, weight, experts, expert, rank, index)

  operands = x, weight, experts
  y, vjp = jax.vjp(functools.partial(run_round, 0), *operands)
  y = jax.lax.fori_loop(
    1, num_rounds, lambda i, y: y + run_round(i, *operands), y
  )
  return y, (vjp, operands, expert, rank, num_rounds)


def _backward(run, residuals, g):
  vjp, operands, expert, rank, num_rounds = residuals

  def add_round(index, grads):
    def run_round(x, weight, experts):
      return run(x, weight, experts, expert, rank, index)

    return jax.tree.map(jnp.add, grads, jax.vjp(run_round, *operands)[1](g))

  grads = jax.lax.fori_loop(1, num_rounds, add_round, vjp(g))
  return *grads, None, None, None


_run_rounds.defvjp(_forward, _backward)

# Values of the config key moe.exchange besides 'auto', by what travels:
#   experts     the weights of all experts to every device,
#   tokens      the tokens of an expert axis to each of its devices,
#   all_to_all  each token to the devices of its experts.
EXCHANGES: dict[str, Callable[..., Any]] = {
  'experts': _with_own_tokens,
  'tokens': _with_own_experts,
  'all_to_all': _with_all_to_all,
}


def _routing(expert, weight, num_experts) -> Routing:
  """Returns a routing of rows alone, without losses and statistics."""
  return Routing(
    expert=expert,
    weight=weight,
    probs=jnp.zeros((0, num_experts)),
    load=jnp.zeros(num_experts, jnp.int32),
    losses={},
    metrics={},
  )
