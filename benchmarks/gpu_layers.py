"""Dispatches of one layer on a device: their differences and their times."""

from collections.abc import Iterator
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from nanomoe.moe import experts as experts_lib
from nanomoe.moe.dispatch import registry
from nanomoe.moe.routing import Routing
from nanomoe.planning import products

LOADS = ('random', 'skewed', 'empty')
# Share of tokens whose first choice is expert 0, of skewed loads.
SKEW = 0.5


class Size(NamedTuple):
  """Sizes of a layer.

  Attributes:
    num_tokens: Number of tokens.
    d_model: Width of the residual stream.
    num_experts: Number of experts.
    top_k: Number of experts of a token.
    d_ff: Width of an expert's hidden layer.
  """

  num_tokens: int
  d_model: int
  num_experts: int
  top_k: int
  d_ff: int


PARITY = Size(2048, 256, 8, 2, 512)
LAYERS = (Size(8192, 1024, 32, 2, 512), Size(8192, 1024, 32, 4, 512))
TINY = Size(64, 8, 4, 2, 12)


def choose(load: str, size: Size) -> np.ndarray:
  """Returns experts `int32[tokens, top_k]`, distinct for each token.

  Args:
    load: 'random' draws all experts equally; 'skewed' makes expert 0 the first
      choice of half of the tokens; 'empty' leaves all but `top_k` experts
      without tokens.
    size: Sizes of the layer.
  """
  rng = np.random.default_rng(0)
  score = rng.random((size.num_tokens, size.num_experts))
  if load == 'skewed':
    score[rng.random(size.num_tokens) < SKEW, 0] = -1
  if load == 'empty':
    score[:, : size.top_k] -= 1
  return score.argsort(axis=1)[:, : size.top_k].astype(np.int32)


def arguments(load: str, size: Size, *, use_bias: bool) -> tuple[Any, ...]:
  """Returns (x, weight, experts, expert, g) on the host, in float32.

  Args:
    load: Key of `LOADS`.
    size: Sizes of the layer.
    use_bias: Whether the experts have biases.
  """
  rng = np.random.default_rng(1)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def param(name, init, shape):
    del name, init
    return normal(*shape) / np.float32(np.sqrt(shape[-2]))

  experts = experts_lib.make(
    param,
    size.d_model,
    num_experts=size.num_experts,
    d_ff=size.d_ff,
    activation='swiglu',
    use_bias=use_bias,
  )
  x, g = (normal(size.num_tokens, size.d_model) for _ in range(2))
  weight = rng.uniform(0.1, 1, (size.num_tokens, size.top_k))
  return x, weight.astype(np.float32), experts, choose(load, size), g


def program(dispatch: str, size: Size, precision: str, factor: float) -> Any:
  """Returns a jitted function of `arguments` to the output and gradients.

  Args:
    dispatch: Key of `registry.DISPATCH`.
    size: Sizes of the layer.
    precision: Precision of the products.
    factor: Capacity over the balanced load, for the dispatch 'capacity'.
  """
  run = registry.build(dispatch, {'capacity_factor': factor})

  def layer(x, weight, experts, expert, g):
    def apply(x, weight, experts):
      load = jnp.zeros(size.num_experts, jnp.int32)
      probs = jnp.zeros((len(x), size.num_experts))
      routing = Routing(expert, weight, probs, load, {}, {})
      return run(x, routing, experts, precision)[0]

    y, vjp = jax.vjp(apply, x, weight, experts)
    of_x, of_weight, of_experts = vjp(g)
    fields = ('w_in', 'w_gate', 'w_out', 'b_in', 'b_out')
    of_experts = {name: getattr(of_experts, name) for name in fields}
    grads = {'x': of_x, 'weight': of_weight, **of_experts}
    return {'y': y, **{k: v for k, v in grads.items() if v is not None}}

  return jax.jit(layer)


def differences(found: Any, expected: Any) -> dict[str, float]:
  """Returns the largest difference of each array over its largest element.

  Args:
    found: Arrays by name.
    expected: Arrays by name, with the same shapes.
  """
  return {
    name: float(
      np.abs(np.float64(found[name]) - value).max()
      / (np.abs(value).max() or 1.0)
    )
    for name, value in expected.items()
  }


def parity(size: Size) -> Iterator[tuple[str, Any]]:
  """Yields the name of each comparison and a function that returns its row.

  The oracle is the dense dispatch in float32 on the CPU. A row also has the
  differences from the dense dispatch in its own precision on its own device.
  """
  # Every assignment fits, so that the capacity drops nothing.
  factor = float(size.num_experts)

  @functools.cache
  def computed(dispatch, precision):
    return program(dispatch, size, precision, factor)

  @functools.cache
  def oracle(load):
    inputs = arguments(load, size, use_bias=True)
    inputs = jax.device_put(inputs, jax.devices('cpu')[0])
    return jax.device_get(computed('dense', 'float32')(*inputs))

  @functools.cache
  def result(dispatch, precision, load):
    inputs = jax.device_put(arguments(load, size, use_bias=True))
    return jax.device_get(computed(dispatch, precision)(*inputs))

  def row(dispatch, precision, load):
    found = result(dispatch, precision, load)
    try:
      from_oracle = differences(found, oracle(load))
    except RuntimeError:  # JAX_PLATFORMS may exclude CPUs.
      from_oracle = None
    return {
      'dispatch': dispatch,
      'precision': precision,
      'load': load,
      'from_oracle': from_oracle,
      'from_dense': differences(found, result('dense', precision, load)),
      'finite': all(bool(np.isfinite(x).all()) for x in found.values()),
    }

  for precision in ('float32', 'bfloat16'):
    for dispatch in registry.DISPATCH:
      for load in LOADS:
        name = f'{dispatch} {precision} {load}'
        yield name, functools.partial(row, dispatch, precision, load)


def times(sizes: tuple[Size, ...], num_calls: int) -> Iterator[tuple[str, Any]]:
  """Yields the name of each layer and a function that returns its row.

  Args:
    sizes: Sizes of the layers.
    num_calls: Timed calls of each.
  """

  def row(dispatch, size):
    inputs = jax.device_put(arguments('random', size, use_bias=False))
    run = program(dispatch, size, 'bfloat16', 1.25)
    start = time.perf_counter()
    compiled = run.lower(*inputs).compile()
    figures = {
      'dispatch': dispatch,
      **size._asdict(),
      'precision': 'bfloat16',
      'compile_sec': time.perf_counter() - start,
      # The products of the chosen experts alone.
      'active_flops': products.count(
        program('grouped', size, 'bfloat16', 1.25), *inputs
      ),
      # XLA's count, which shows whether ragged products compute all rows.
      'compiled_flops': _compiled_flops(compiled),
      'temporary_bytes': temporary_bytes(compiled),
    }
    for load in LOADS[:2]:
      inputs = jax.device_put(arguments(load, size, use_bias=False))
      jax.block_until_ready(compiled(*inputs))
      seconds = []
      for _ in range(num_calls):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
      figures[load] = peers.summary(seconds)
    return figures

  for size in sizes:
    for dispatch in registry.DISPATCH:
      name = f'{dispatch}, top {size.top_k} of {size.num_experts}'
      yield name, functools.partial(row, dispatch, size)


def temporary_bytes(compiled: jax.stages.Compiled) -> int | None:
  """Returns the size of a program's temporaries; None if XLA reports none."""
  analysis = compiled.memory_analysis()
  return None if analysis is None else analysis.temp_size_in_bytes


def _compiled_flops(compiled: jax.stages.Compiled) -> float | None:
  """Returns XLA's count of a program's operations; None if it has none."""
  try:
    return (compiled.cost_analysis() or {}).get('flops')
  except RuntimeError:  # Some platforms do not implement it.
    return None
