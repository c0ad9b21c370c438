"""The dropless dispatch: chosen experts alone, whatever the loads."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nanomoe.moe.dispatch.interface import dispatch_metrics
from nanomoe.moe.dispatch.plan import Plan, make_plan
from nanomoe.moe.experts import Experts
from nanomoe.moe.routing import Routing
from nanomoe.ops import matmul, permute
from nanomoe.ops.vary import vary, varying_axes
from trainers.metrics import Mean


def dropless(
  x: Float[Array, 'tokens d_model'],
  routing: Routing,
  experts: Experts,
  precision: str,
  *,
  num_expected: int | None = None,
) -> tuple[Float[Array, 'tokens d_model'], dict[str, Mean]]:
  """Computes the chosen experts alone and drops no token.

  Each expert first computes as many rows as a balanced load has, padded where
  an expert has fewer. Overflow rows follow in blocks of one expert, by a loop
  whose length depends on the loads. Shapes are static; the work is not. At
  worst the rows are twice those of balanced loads, plus a block per expert and
  the padding of the last iteration. The blocks are those of Gale et al. 2022
  (MegaBlocks), sec. 4.

  Args:
    x: Activations of the tokens.
    routing: Experts and weights of each token.
    experts: Experts of the layer.
    precision: Precision of the experts' products.
    num_expected: Number of assignments that the balanced load is a share of;
      None for all. It changes the speed alone.

  Returns:
    The combined output of each token, and metrics by name.
  """
  plan = make_plan(routing.expert, experts.w_in.shape[0], num_expected)
  y: Any = run_plan(x, routing.weight, experts, plan, precision)
  return y, dispatch_metrics(routing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run_plan(
  x: Float[Array, 'tokens d_model'],
  weight: Float[Array, 'tokens k'],
  experts: Experts,
  plan: Plan,
  precision: str,
) -> Float[Array, 'tokens d_model']:
  """Returns the weighted sum of each token's experts.

  The gradient is written by hand. JAX cannot differentiate a loop of dynamic
  length in reverse, and this gradient gathers where JAX's would scatter.

  Args:
    x: Activations of the tokens.
    weight: Weight of each assignment.
    experts: Experts of the layer.
    plan: Rows of the assignments.
    precision: Precision of the products.
  """
  return _forward(x, weight, experts, plan, precision)[0]


def _forward(x, weight, experts, plan, precision):
  x = matmul.rounded(x, precision)  # Once for all rows.
  operands = x, weight, experts
  weigh_output = _is_wide(experts)
  y, vjps = [], []
  chunks = _chunks(experts, plan)
  keep = len(chunks) == 1 or _keeps_hidden(experts, precision)
  for chunk in chunks:
    assignment = plan.assignment_of_slot[chunk]
    run, inputs = _make_run(operands, assignment, chunk, precision)
    if weigh_output:
      inputs = inputs[:2]
    rows, vjp = jax.vjp(run, *inputs) if keep else (run(*inputs), None)
    y.append(rows)
    vjps.append(vjp)
  rows = _concatenate(y) if y else None  # [slots, d_model]
  y = vary(jnp.zeros(x.shape, weight.dtype), varying_axes(x))
  if rows is not None:
    y = permute.sum_rows(rows, plan.slot, weight if weigh_output else None)
  y = _add_overflow(y, operands, plan.overflow, precision)
  return y, (operands, plan, vjps, rows if weigh_output else None)


def _backward(precision, residuals, g):
  operands, plan, vjps, y_rows = residuals
  _, weight, experts = operands
  g = matmul.rounded(g, precision)
  parts = []
  for chunk, vjp in zip(_chunks(experts, plan), vjps, strict=True):
    run = functools.partial(_chunk_grads, chunk, precision, vjp)
    arguments = operands, plan.assignment_of_slot, y_rows, g
    if vjp:
      parts.append(run(*arguments))
    else:
      is_true = plan.overflow.num_trips >= 0
      parts.append(_in_branch(is_true, run, *arguments))
  if parts:
    of_experts, of_rows, of_weight = zip(*parts, strict=True)
    grads = (
      permute.sum_rows(_concatenate(of_rows), plan.slot),
      permute.gather_or_zero(_concatenate(of_weight), plan.slot),
      jax.tree.map(lambda *g: jnp.concatenate(g), *of_experts),
    )
  else:
    grads = jax.tree.map(
      lambda a: vary(jnp.zeros(a.shape, weight.dtype), varying_axes(a)),
      operands,
    )
  grads = _add_overflow_grads(grads, g, operands, plan.overflow, precision)
  return *grads, None


def _chunk_grads(
  chunk, precision, vjp, operands, assignment_of_slot, y_rows, g
):
  """Returns the gradients of a chunk's experts, rows and weights."""
  _, weight, _ = operands
  assignment = assignment_of_slot[chunk]
  run, inputs = _make_run(operands, assignment, chunk, precision)
  g_rows = _gather_rows(g, assignment, weight)  # [experts, capacity, d_model]
  if y_rows is None:
    vjp = vjp or jax.vjp(run, *inputs)[1]
    return vjp(g_rows)
  vjp = vjp or jax.vjp(run, *inputs[:2])[1]
  of_experts, of_rows = vjp(inputs[2][..., None] * g_rows)
  y_chunk = y_rows.reshape(*assignment_of_slot.shape, -1)[chunk]
  return of_experts, of_rows, matmul.row_sums(y_chunk * g_rows)


def _in_branch(
  is_true: jax.Array, fn: Callable[..., Any], *arguments: Any
) -> Any:
  """Returns `fn(*arguments)`, computed in a branch that is always taken.

  XLA would otherwise merge the hidden layer with that of the forward pass and
  keep it, or compute the hidden layers of several chunks before it needs them.
  """
  shapes = jax.eval_shape(fn, *arguments)
  return jax.lax.cond(
    is_true,
    fn,
    lambda *_: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes),
    *arguments,
  )


run_plan.defvjp(_forward, _backward)


# Size of a chunk's intermediate results: half of a core's second-level cache.
CACHE_BYTES = 1 << 20

# Most chunks of a layer. Each is a part of the program, to be compiled.
_MAX_CHUNKS = 12


def chunk_size(expert_bytes: int, num_experts: int) -> int:
  """Returns how many experts to compute at a time.

  On CPUs the intermediate results of a chunk fit the cache: writing them to
  memory and reading them costs more than many a product. Other devices compute
  all experts at a time.

  Args:
    expert_bytes: Size of an expert's intermediate results, in bytes.
    num_experts: Number of experts.
  """
  if jax.default_backend() != 'cpu':
    return num_experts
  if num_experts * expert_bytes <= 4 * CACHE_BYTES:
    return num_experts
  return max(CACHE_BYTES // expert_bytes, -(-num_experts // _MAX_CHUNKS), 2)


def _is_wide(experts: Experts) -> bool:
  """Returns whether weights multiply the outputs and not the hidden layers.

  The gradient of the weights then needs the outputs, which are kept, but no
  pass over the hidden layers. On CPUs that pays for wide hidden layers.
  """
  _, d_ff, d_model = experts.w_out.shape
  return d_ff > 3 * d_model


def _keeps_hidden(experts: Experts, precision: str) -> bool:
  """Returns whether the gradient of several chunks keeps the hidden layers.

  float32 products cost more than writing hidden layers and reading them.
  bfloat16 products cost less, unless the hidden layer is narrow.
  """
  _, d_ff, d_model = experts.w_out.shape
  return precision == 'float32' or d_ff <= d_model


def _chunks(experts: Experts, plan: Plan) -> list[slice]:
  """Returns slices of experts that are computed together."""
  num_experts, d_ff, _ = experts.w_out.shape
  _, capacity = plan.assignment_of_slot.shape
  if not capacity:
    return []
  size = chunk_size(4 * capacity * d_ff, num_experts)  # 4 bytes a number.
  return [slice(i, i + size) for i in range(0, num_experts, size)]


# Activations, rounded; weight of each assignment; experts of the layer.
_Operands = tuple[jax.Array, jax.Array, Experts]


def _make_run(
  operands: _Operands,
  assignment: jax.Array,
  expert: slice | jax.Array,
  precision: str,
) -> tuple[Callable[..., jax.Array], tuple[Experts, jax.Array, jax.Array]]:
  """Returns a differentiable function of rows, and its arguments.

  The last argument, the weight of each row, may be left out.

  Args:
    operands: Operands of the layer.
    assignment: Assignment of each row, `[G, rows]`.
    expert: Experts of the G groups of rows.
    precision: Precision of the products.
  """
  x, weight, experts = operands

  def run(experts, rows, weight=None):
    return experts(rows, precision, weight)  # [G, rows, d_model]

  return run, (
    experts.take(expert),
    _gather_rows(x, assignment, weight),  # [G, rows, d_model]
    permute.gather_or_zero(weight.reshape(-1), assignment),  # [G, rows]
  )


def _gather_rows(x, assignment, weight):
  """Returns the token of each assignment, in the format of `weight`.

  An empty row is that of any token, because its weight is 0.
  """
  token = assignment // weight.shape[1]
  return jnp.take(x, token, axis=0, mode='clip').astype(weight.dtype)


def _concatenate(chunks: Sequence[jax.Array]) -> jax.Array:
  """Returns chunks `[experts, capacity, ...]` as one array `[slots, ...]`."""
  return jnp.concatenate([c.reshape(-1, *c.shape[2:]) for c in chunks])


def _add_overflow(y, operands, overflow, precision):
  """Adds the experts' weighted outputs for the overflow rows to `y`."""
  _, weight, _ = operands

  def add_blocks(i, y):
    assignment, expert = overflow.assignment[i], overflow.expert[i]
    run, inputs = _make_run(operands, assignment, expert, precision)
    token = assignment // weight.shape[1]
    return y.at[token].add(run(*inputs), mode='drop')

  return jax.lax.fori_loop(0, overflow.num_trips, add_blocks, y)


def _add_overflow_grads(grads, g, operands, overflow, precision):
  """Adds the gradients of the overflow rows to those of the slots."""
  _, weight, _ = operands

  def add_blocks(i, grads):
    x_grad, weight_grad, experts_grad = grads
    assignment, expert = overflow.assignment[i], overflow.expert[i]
    run, inputs = _make_run(operands, assignment, expert, precision)
    _, vjp = jax.vjp(run, *inputs)
    of_experts, of_rows, of_weight = vjp(_gather_rows(g, assignment, weight))
    token = assignment // weight.shape[1]
    return (
      x_grad.at[token].add(of_rows, mode='drop'),
      weight_grad.at[assignment].add(of_weight, mode='drop'),
      jax.tree.map(
        lambda total, part: total.at[expert].add(part), experts_grad, of_experts
      ),
    )

  x_grad, weight_grad, experts_grad = grads
  grads = x_grad, weight_grad.reshape(-1), experts_grad
  x_grad, weight_grad, experts_grad = jax.lax.fori_loop(
    0, overflow.num_trips, add_blocks, grads
  )
  return x_grad, weight_grad.reshape(weight.shape), experts_grad
