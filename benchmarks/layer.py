"""python -m benchmarks.layer [--precision=float32]

Milliseconds of one dropless layer, forward and backward, at equal parameters
and equal work but ever finer experts: on 4096 tokens of width 128, SwiGLU,
random weights, without a router. Beside it the plan alone, the layer at skewed
loads, and the sum of the layer's parts, each timed alone: products, SwiGLU and
its gradient, transposes, roundings, gathers and the plan. In turn, in one
process. Writes benchmarks/results/layer-PRECISION.json.
"""

from collections.abc import Callable
import functools
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, results
from nanomoe.moe import experts as experts_lib
from nanomoe.moe.dispatch import dropless, plan
from nanomoe.moe.routing import Routing
from nanomoe.ops import matmul, permute
from nanomoe.ops.activations import swiglu
from nanomoe.run import cli

_FLAGS = flags.FlagValues()
_STEPS = flags.DEFINE_integer(
  'steps', 20, 'Timed calls of each.', lower_bound=2, flag_values=_FLAGS
)
_PRECISION = flags.DEFINE_enum(
  'precision',
  'bfloat16',
  matmul.PRECISIONS,
  'Precision of the products.',
  flag_values=_FLAGS,
)
NUM_TOKENS, D_MODEL = 4096, 128
# Experts, experts of a token, width of an expert's hidden layer.
SIZES = ((4, 2, 512), (8, 2, 344), (16, 4, 168), (64, 8, 84), (128, 8, 84))
# Load of the first expert over the balanced load.
SKEW = 2


def choices(num_experts: int, top_k: int, skew: float = 1.0) -> np.ndarray:
  """Returns experts `[tokens, top_k]` with balanced or skewed loads.

  Args:
    num_experts: Number of experts.
    top_k: Number of experts of a token.
    skew: Load of expert 0 over the balanced load; the others share the rest.
  """
  rng = np.random.default_rng(0)
  turns = rng.permutation(NUM_TOKENS)[:, None] * top_k + np.arange(top_k)
  if skew == 1:
    return turns % num_experts
  expert = turns % (num_experts - 1) + 1
  num_chosen = int(skew * expert.size / num_experts)
  chosen = rng.permutation(NUM_TOKENS)[:num_chosen]
  expert[chosen, rng.integers(0, top_k, num_chosen)] = 0
  return expert


def layer(
  num_experts: int, top_k: int, d_ff: int, precision: str, skew: float = 1.0
) -> Callable[[], Any]:
  """Returns a function that computes a layer and its gradients once."""
  expert = choices(num_experts, top_k, skew)
  weight = _random((NUM_TOKENS, top_k))
  x, g = _random((NUM_TOKENS, D_MODEL)), _random((NUM_TOKENS, D_MODEL))

  @jax.jit
  def run(x, expert, weight, experts, g):
    def apply(x, weight, experts):
      load = jnp.zeros(num_experts, jnp.int32)
      routing = Routing(expert, weight, jnp.zeros((1, 1)), load, {}, {})
      return dropless.dropless(x, routing, experts, precision)[0]

    y, vjp = jax.vjp(apply, x, weight, experts)
    return y, vjp(g)

  arguments = (x, jnp.int32(expert), weight, _experts(num_experts, d_ff), g)
  return lambda: run(*arguments)


def make_plan(num_experts: int, top_k: int) -> Callable[[], Any]:
  """Returns a function that makes the plan of a layer once."""
  run = jax.jit(functools.partial(plan.make_plan, num_experts=num_experts))
  expert = jnp.int32(choices(num_experts, top_k))
  return lambda: run(expert)


def parts(
  num_experts: int, top_k: int, d_ff: int, precision: str
) -> dict[str, Callable[[], Any]]:
  """Returns functions that compute one part of a layer each."""
  capacity = NUM_TOKENS * top_k // num_experts
  made = plan.make_plan(jnp.int32(choices(num_experts, top_k)), num_experts)
  dtype = jnp.dtype(precision)
  rows = _random((num_experts, capacity, D_MODEL), dtype)
  wide = _random((num_experts, capacity, d_ff))
  hidden = wide.astype(dtype)
  experts = _experts(num_experts, d_ff)
  w_in, w_out = experts.w_in.astype(dtype), experts.w_out.astype(dtype)
  x = _random((NUM_TOKENS, D_MODEL))
  flat = _random((num_experts * capacity, D_MODEL))
  token = made.assignment_of_slot // top_k

  def product(subscripts, a, b):
    return functools.partial(
      matmul.einsum, subscripts, precision=precision, bias=None
    ), (a, b)

  def weight_grad(a, b):
    def of_weight(a, b):
      return matmul.gradients(
        experts_lib.PRODUCT, a, jnp.zeros((1, 1, 1)), b, precision
      )[1]

    return of_weight, (a, b)

  def activation_grad(x, gate, g):
    y, vjp = jax.vjp(swiglu, x, gate)
    return [a.astype(dtype) for a in (y, *vjp(g))]

  def gather(x):
    return permute.gather_or_zero(x.astype(dtype), token)

  def combine(rows):
    return sum(permute.gather_or_zero(rows, i) for i in made.slot.T)

  def round_weights(experts):
    return jax.tree.map(lambda w: w.astype(dtype), experts)

  # The in and gate products are two, and so are their gradients.
  timed = {
    'in': (2, *product('gni,gio->gno', rows, w_in)),
    'out': (1, *product('gni,gio->gno', hidden, w_out)),
    'in, of rows': (2, *product('gno,gio->gni', hidden, w_in)),
    'out, of rows': (1, *product('gno,gio->gni', rows, w_out)),
    'in, of weights': (2, *weight_grad(rows, hidden)),
    'out, of weights': (1, *weight_grad(hidden, rows)),
    'SwiGLU': (1, lambda a, b: swiglu(a, b).astype(dtype), (wide, wide)),
    'SwiGLU, gradient': (1, activation_grad, (wide, wide, wide)),
    'rounding of weights': (1, round_weights, (experts,)),
    'gathers of rows': (2, gather, (x,)),
    'sums over choices': (2, combine, (flat,)),
  }
  functions = {'plan': make_plan(num_experts, top_k)}
  for name, (count, fn, arguments) in timed.items():
    run = functools.partial(jax.jit(fn), *arguments)
    for i in range(count):
      functions[f'{name} {i}'] = run
  return functions


def _random(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  values = np.random.default_rng(0).normal(size=shape)
  return jnp.asarray(values, jnp.float32).astype(dtype)


def _experts(num_experts: int, d_ff: int) -> experts_lib.Experts:
  return experts_lib.make(
    lambda _, init, shape: _random(shape) / np.sqrt(shape[-2]),
    D_MODEL,
    num_experts=num_experts,
    d_ff=d_ff,
    activation='swiglu',
    use_bias=False,
  )


def measure(precision: str, num_steps: int) -> dict[str, Any]:
  """Returns the summary of each function's seconds, and sums of parts."""
  functions: dict[str, Callable[[], Any]] = {}
  for size in SIZES:
    name = ', '.join(map(str, size))
    functions[f'layer {name}'] = layer(*size, precision)
    functions[f'plan {name}'] = make_plan(*size[:2])
    functions[f'skewed {name}'] = layer(*size, precision, SKEW)
    for part, run in parts(*size, precision).items():
      functions[f'part {name}: {part}'] = run
  taken: dict[str, list[float]] = {name: [] for name in functions}
  for i in range(num_steps + 2):
    for name, run in functions.items():
      jax.block_until_ready(run())  # The one before has emptied the caches.
      start = time.perf_counter()
      jax.block_until_ready(run())
      if i >= 2:
        taken[name].append(time.perf_counter() - start)
  summaries = {name: peers.summary(values) for name, values in taken.items()}
  rows = {}
  for size in SIZES:
    name = ', '.join(map(str, size))
    rows[name] = {
      kind: summaries[f'{kind} {name}'] for kind in ('layer', 'plan', 'skewed')
    }
    rows[name]['parts'] = {
      key.partition(': ')[2]: row['median_sec']
      for key, row in summaries.items()
      if key.startswith(f'part {name}:')
    }
  return {'precision': precision, 'rows': rows}


def table(figures: dict[str, Any]) -> str:
  """Returns the figures as a table in Markdown."""
  rows = figures['rows']
  base = rows['8, 2, 344']['layer']['median_sec']
  lines = [
    '| experts, top_k, width | layer, ms: median (quartiles) '
    '| relative to 8, 2, 344 | relative to its parts | plan, ms '
    f'| load of {SKEW} x the mean |',
    '|---|---:|---:|---:|---:|---:|',
  ]
  for name, row in rows.items():
    seconds = row['layer']['median_sec']
    low, high = (1e3 * s for s in row['layer']['quartiles_sec'])
    lines.append(
      f'| {name} | {1e3 * seconds:.1f} ({low:.1f} to {high:.1f}) '
      f'| {seconds / base:.2f} | {seconds / sum(row["parts"].values()):.2f} '
      f'| {1e3 * row["plan"]["median_sec"]:.2f} '
      f'| {row["skewed"]["median_sec"] / seconds:.2f} |'
    )
  machine = results.describe(figures['machine'])
  return '\n'.join([*lines, '', f'{figures["precision"]}. {machine}'])


def main(_: None) -> int:
  precision = _PRECISION.value
  name = f'layer-{precision}'
  results.write(name, measure(precision, _STEPS.value))
  print(table(results.read(name) or {}))
  return 0


if __name__ == '__main__':
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__))
