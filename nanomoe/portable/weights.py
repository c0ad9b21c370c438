"""Names and layouts of weights here and in transformers: one table.

Queries, keys and values are one kernel here, and the experts of a layer are one
array. `parts` splits them into views that have one name on each side. The rows
of the table serve exports and imports.
"""

from collections.abc import Callable, Iterator, Mapping
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.model import stack
from nanomoe.portable.classes import Facts, HFClass

Arrays = dict[str, np.ndarray]


class Transform(NamedTuple):
  """Change of a matrix, or vector, between both sides.

  Attributes:
    to_hf: Function from ours to that of transformers.
    from_hf: Inverse function.
  """

  to_hf: Callable[[np.ndarray], np.ndarray]
  from_hf: Callable[[np.ndarray], np.ndarray]


class Row(NamedTuple):
  """Row of the table.

  Attributes:
    ours: Name of a part; `{i}` is a layer and `{e}` an expert.
    theirs: Name in transformers.
    transform: Change of the part.
  """

  ours: str
  theirs: str
  transform: Transform


SAME = Transform(lambda x: x, lambda x: x)
TRANSPOSED = Transform(np.transpose, np.transpose)
# Qwen2-MoE multiplies its shared expert by a sigmoid, which is 1/2 at zero.
# Factors of 2 are exact.
DOUBLED = Transform(lambda x: 2 * x.T, lambda x: x.T / 2)

_LAYER = 'model.layers.{i}'
_ATTENTION = f'{_LAYER}.self_attn'
_COMMON = (
  Row('token_embedding', 'model.embed_tokens.weight', SAME),
  Row('final_norm/scale', 'model.norm.weight', SAME),
  Row('head/kernel', 'lm_head.weight', TRANSPOSED),
  Row(
    'block_{i}/attention_norm/scale', f'{_LAYER}.input_layernorm.weight', SAME
  ),
  Row(
    'block_{i}/feed_forward_norm/scale',
    f'{_LAYER}.post_attention_layernorm.weight',
    SAME,
  ),
  *(
    Row(
      f'block_{{i}}/attention/{ours}/kernel',
      f'{_ATTENTION}.{theirs}_proj.weight',
      TRANSPOSED,
    )
    for ours, theirs in (('q', 'q'), ('k', 'k'), ('v', 'v'), ('out', 'o'))
  ),
  *(
    Row(
      f'block_{{i}}/attention/{norm}/scale',
      f'{_ATTENTION}.{norm}.weight',
      SAME,
    )
    for norm in ('q_norm', 'k_norm')
  ),
  *(
    Row(
      f'block_{{i}}/feed_forward/{ours}',
      f'{_LAYER}.mlp.{theirs}_proj.weight',
      TRANSPOSED,
    )
    for ours, theirs in (('w_gate', 'gate'), ('w_in', 'up'), ('w_out', 'down'))
  ),
)


def table(hf: HFClass) -> tuple[Row, ...]:
  """Returns the rows of a class."""
  experts, shared = f'{_LAYER}.{hf.experts}', f'{_LAYER}.mlp.{hf.shared}'
  matrices = 'w_gate', 'w_in', 'w_out'
  is_gated = hf.model_type == 'qwen2_moe'
  rows = [
    *_COMMON,
    Row('block_{i}/moe/router/kernel', f'{experts}.gate.weight', TRANSPOSED),
    Row(
      'block_{i}/moe/router/bias',
      f'{experts}.gate.e_score_correction_bias',
      SAME,
    ),
    *(
      Row(
        f'block_{{i}}/moe/{ours}/{{e}}',
        f'{experts}.experts.{{e}}.{theirs}.weight',
        TRANSPOSED,
      )
      for ours, theirs in zip(matrices, hf.projections, strict=True)
    ),
    *(
      Row(
        f'block_{{i}}/shared/{ours}',
        f'{shared}.{theirs}.weight',
        DOUBLED if is_gated and ours == 'w_out' else TRANSPOSED,
      )
      for ours, theirs in zip(matrices, hf.projections, strict=True)
      if hf.shared
    ),
  ]
  return tuple(rows)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns parameters by path, such as 'block_0/attention/qkv/kernel'.

  Args:
    params: Tree of parameters; stacked blocks are unrolled.
  """
  if stack.STACKED in params:
    params = stack.unstack(params)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in leaves
  }


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of parameters by path."""
  tree: dict[str, Any] = {}
  for path, value in arrays.items():
    *parents, last = path.split('/')
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    node[last] = value
  return tree


def parts(
  arrays: Mapping[str, np.ndarray],
  bias: np.ndarray | None,
  config: Config,
  facts: Facts,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the names of parts, and views of them.

  The first axis of a view is the input of a matrix. Its other axes together are
  the output. A router's noise, which only training uses, is no part.

  Args:
    arrays: Contiguous parameters by path, as of `flatten`.
    bias: Selection biases of the routers, `[layers, experts]`, or None.
    config: Config of the model.
    facts: Properties of the config.
  """
  num_heads = config.model.num_heads
  num_kv_heads = config.model.num_kv_heads or num_heads
  for path, x in arrays.items():
    block, _, rest = path.partition('/')
    if rest == 'attention/qkv/kernel':
      heads = x.reshape(len(x), num_kv_heads, num_heads // num_kv_heads + 2, -1)
      yield f'{block}/attention/q/kernel', heads[:, :, :-2]
      yield f'{block}/attention/k/kernel', heads[:, :, -2]
      yield f'{block}/attention/v/kernel', heads[:, :, -1]
    elif match := re.fullmatch(r'(feed_forward/)?moe/(w_\w+)', rest):
      for i, expert in enumerate(x):
        yield f'{block}/moe/{match[2]}/{i}', expert
    elif match := re.fullmatch(r'feed_forward/(shared/)?(w_\w+)', rest):
      kind = 'shared' if match[1] else 'feed_forward'
      yield f'{block}/{kind}/{match[2]}', x[0]
    elif rest.endswith('moe/router/kernel'):
      yield f'{block}/moe/router/kernel', x
    elif not rest.endswith('moe/router/noise'):
      yield path, x
  if bias is not None:
    sparse = [i for i in range(config.model.num_layers) if i not in facts.dense]
    for row, i in zip(bias, sparse, strict=True):
      yield f'block_{i}/moe/router/bias', row


def constants(
  hf: HFClass, config: Config, facts: Facts, has_bias: bool
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of weights that a class has and this package lacks.

  They are zero: a gate of the shared expert, a shared expert or a selection
  bias.

  Args:
    hf: Class of the model.
    config: Config of the model.
    facts: Properties of the config.
    has_bias: Whether the routers have selection biases.
  """
  d_model, found = config.model.d_model, {}
  for i in range(config.model.num_layers):
    if i in facts.dense or not hf.shared:
      continue
    prefix = f'model.layers.{i}.mlp'
    if hf.model_type == 'qwen2_moe':
      found[f'{prefix}.shared_expert_gate.weight'] = (1, d_model)
      width = 1
    else:
      width = config.moe.d_ff
      if not has_bias:
        name = f'{prefix}.gate.e_score_correction_bias'
        found[name] = (config.moe.num_experts,)
    if not facts.num_shared:
      gate, up, down = (
        f'{prefix}.{hf.shared}.{name}.weight' for name in hf.projections
      )
      found |= {gate: (width, d_model), up: (width, d_model)}
      found[down] = (d_model, width)
  return found


class Mapped(NamedTuple):
  """Part of a parameter with its name in transformers.

  Attributes:
    name: Name in transformers.
    view: View of the part.
    transform: Change of the part.
  """

  name: str
  view: np.ndarray
  transform: Transform

  def to_hf(self) -> np.ndarray:
    """Returns the weight of transformers."""
    x = self.view
    return self.transform.to_hf(x.reshape(len(x), -1) if x.ndim > 1 else x)

  def set(self, value: np.ndarray) -> None:
    """Writes the part of a weight of transformers.

    Raises:
      ValueError: The weight has another shape.
    """
    shape = self.to_hf_shape()
    if value.shape != shape:
      raise ValueError(
        f'{self.name}: its shape is {list(value.shape)}; it must be '
        f'{list(shape)}'
      )
    self.view[...] = self.transform.from_hf(value).reshape(self.view.shape)

  def to_hf_shape(self) -> tuple[int, ...]:
    """Returns the shape of the weight of transformers."""
    shape = self.view.shape
    if self.transform is SAME:
      return shape
    return (int(np.prod(shape[1:])), shape[0])


def mapped(
  arrays: Mapping[str, np.ndarray],
  bias: np.ndarray | None,
  config: Config,
  facts: Facts,
  hf: HFClass,
) -> Iterator[Mapped]:
  """Yields the parts of a model with their names in a class.

  Args:
    arrays: Parameters by path, as of `flatten`.
    bias: Selection biases of the routers, `[layers, experts]`, or None.
    config: Config of the model.
    facts: Properties of the config.
    hf: Class of the model.
  """
  rows = {row.ours: row for row in table(hf)}
  for name, view in parts(arrays, bias, config, facts):
    numbers = {}
    pattern = name
    if match := re.match(r'block_(\d+)/', name):
      numbers['i'] = match[1]
      pattern = f'block_{{i}}/{name[match.end() :]}'
    if match := re.search(r'/(\d+)$', pattern):
      numbers['e'] = match[1]
      pattern = f'{pattern[: match.start()]}/{{e}}'
    row = rows[pattern]
    yield Mapped(row.theirs.format(**numbers), view, row.transform)
