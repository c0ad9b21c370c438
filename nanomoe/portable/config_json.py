"""Value of a config.json of transformers, written and read by one table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nanomoe.config.schema import Config, flatten
from nanomoe.model.norms import EPSILON
from nanomoe.model.positions import THETA
from nanomoe.portable import classes


class Layout(NamedTuple):
  """Keys of one class.

  Attributes:
    keys: Key of this package by key of transformers.
    fixed: Values that every model of this package has, by key of transformers.
    defaults: Values of keys that a config.json may lack, where they are not
      those of `_DEFAULTS`.
    implied: Values by key of this package that the class itself states.
  """

  keys: dict[str, str]
  fixed: dict[str, Any] = {}
  defaults: dict[str, Any] = {}
  implied: dict[str, Any] = {}


_KEYS = {
  'hidden_size': 'model.d_model',
  'num_hidden_layers': 'model.num_layers',
  'num_attention_heads': 'model.num_heads',
  'num_key_value_heads': 'model.num_kv_heads',
  'max_position_embeddings': 'block_size',
  'tie_word_embeddings': 'model.tie_embeddings',
}
_FIXED = {
  'hidden_act': 'silu',
  'rms_norm_eps': EPSILON,
  'rope_theta': THETA,
  'attention_bias': False,
}
_DEFAULTS = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'rope_theta': 10_000.0,
  'attention_bias': False,
  'mlp_bias': False,
  'use_sliding_window': False,
  'sliding_window': None,
  'use_qk_norm': False,
  'max_position_embeddings': 2048,
  'tie_word_embeddings': False,
  'norm_topk_prob': False,
  'decoder_sparse_step': 1,
  'routed_scaling_factor': 1.0,
  'first_k_dense_replace': 0,
  'n_group': 1,
  'topk_group': 1,
}
_EXPERTS = {
  'num_experts_per_tok': 'moe.top_k',
  'moe_intermediate_size': 'moe.d_ff',
  'intermediate_size': 'moe.dense_d_ff',
}
_SOFTMAX_KEYS = {
  **_EXPERTS,
  'num_experts': 'moe.num_experts',
  'norm_topk_prob': 'moe.router.renormalize',
  'decoder_sparse_step': 'moe.every',
}
_SIGMOID_KEYS = {
  **_EXPERTS,
  'n_routed_experts': 'moe.num_experts',
  'n_shared_experts': 'moe.num_shared',
  'routed_scaling_factor': 'moe.router.route_scale',
  'n_group': 'moe.router.num_groups',
  'topk_group': 'moe.router.groups_kept',
  'first_k_dense_replace': 'moe.first_dense_layers',
}
_SOFTMAX = {'moe.router.type': 'Softmax'}
_SIGMOID = {'moe.router.type': 'Sigmoid'}
_QK_NORM = {'model.qk_norm': True}

# The defaults are those of the classes in transformers 5.
_LAYOUTS = {
  'llama': Layout({'intermediate_size': 'moe.dense_d_ff'}, {'mlp_bias': False}),
  'qwen3': Layout(
    {'intermediate_size': 'moe.dense_d_ff'},
    {'use_sliding_window': False},
    {'num_key_value_heads': 32, 'head_dim': 128},
    _QK_NORM,
  ),
  'mixtral': Layout(
    {
      'intermediate_size': 'moe.d_ff',
      'num_local_experts': 'moe.num_experts',
      'num_experts_per_tok': 'moe.top_k',
    },
    {'sliding_window': None},
    {
      'rms_norm_eps': 1e-5,
      'rope_theta': 1e6,
      'num_key_value_heads': 8,
      'num_local_experts': 8,
      'num_experts_per_tok': 2,
    },
    {**_SOFTMAX, 'moe.router.renormalize': True},
  ),
  'qwen3_moe': Layout(
    _SOFTMAX_KEYS,
    {'use_sliding_window': False},
    {'num_key_value_heads': 4, 'num_experts_per_tok': 8},
    {**_SOFTMAX, **_QK_NORM},
  ),
  'qwen2_moe': Layout(
    _SOFTMAX_KEYS,
    {'use_sliding_window': False, 'qkv_bias': False},
    {
      'qkv_bias': True,
      'num_key_value_heads': 16,
      'num_experts_per_tok': 4,
      'shared_expert_intermediate_size': 5632,
    },
    _SOFTMAX,
  ),
  'dots1': Layout(
    _SIGMOID_KEYS,
    {'norm_topk_prob': True, 'sliding_window': None},
    {'sliding_window': 4096, 'num_key_value_heads': 32},
    {**_SIGMOID, **_QK_NORM},
  ),
  'glm4_moe': Layout(
    _SIGMOID_KEYS,
    {
      'norm_topk_prob': True,
      'use_qk_norm': False,
      'partial_rotary_factor': 1.0,
      'num_nextn_predict_layers': 0,
    },
    {
      'rms_norm_eps': 1e-5,
      'norm_topk_prob': True,
      'partial_rotary_factor': 0.5,
      # Transformers ignores the weights of further predictions.
      'num_nextn_predict_layers': 0,
      'n_shared_experts': 1,
      'first_k_dense_replace': 1,
      'num_key_value_heads': 8,
      'num_experts_per_tok': 8,
    },
    _SIGMOID,
  ),
}
# Keys whose value may be 0.
_MAY_BE_ZERO = ('n_shared_experts', 'first_k_dense_replace')
# Options that no class has, and options that only some have.
_OURS = {
  **classes.NEEDED,
  'model.qk_norm': False,
  'moe.num_shared': 0,
  'moe.every': 1,
  'moe.first_dense_layers': 0,
}


def write(config: Config, vocab_size: int, dtype: str) -> dict[str, Any]:
  """Returns the value of config.json for a model that has a class.

  Args:
    config: Config of the run, for which `classes.problems` is empty.
    vocab_size: Number of rows of the embedding.
    dtype: Type of the weights, 'float32' or 'bfloat16'.
  """
  hf, facts = classes.find(config), classes.facts(config)
  assert hf, 'classes.problems is empty'
  layout, model = _LAYOUTS[hf.model_type], config.model
  ours = {
    **_ROUTER_DEFAULTS,
    **dict(flatten(config.to_dict())),
    'model.num_kv_heads': model.num_kv_heads or model.num_heads,
    # TopK too divides weights by their sum.
    'moe.router.renormalize': facts.router == 'normalized',
    # A class that always has a shared expert gets a zero one.
    'moe.num_shared': facts.num_shared or 1,
  }
  rope = {'rope_type': 'default', 'rope_theta': THETA}
  if 'partial_rotary_factor' in layout.fixed:
    rope['partial_rotary_factor'] = layout.fixed['partial_rotary_factor']
  found = {
    'architectures': [hf.name],
    'model_type': hf.model_type,
    'vocab_size': vocab_size,
    'head_dim': model.d_model // model.num_heads,
    'rope_parameters': rope,
    'attention_dropout': 0.0,
    'dtype': dtype,
    'bos_token_id': None,
    'eos_token_id': None,
    'pad_token_id': None,
    **_FIXED,
    **layout.fixed,
    **{key: ours[name] for key, name in {**_KEYS, **layout.keys}.items()},
  }
  if 'decoder_sparse_step' in layout.keys:
    found['mlp_only_layers'] = list(range(facts.first))
  if hf.model_type == 'qwen2_moe':
    width = facts.num_shared * config.moe.d_ff
    found['shared_expert_intermediate_size'] = width or 1
  return found


_ROUTER_DEFAULTS = {
  'moe.router.route_scale': 1.0,
  'moe.router.num_groups': 1,
  'moe.router.groups_kept': 1,
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of a config of this package, by dotted key.

  Args:
    values: Value of a config.json.

  Raises:
    ValueError: A line for each property that this package lacks.
  """
  kind = values.get('model_type')
  if not isinstance(kind, str) or kind not in _LAYOUTS:
    raise ValueError(
      f'model_type={kind!r}: it must be one of {", ".join(_LAYOUTS)}'
    )
  layout = _LAYOUTS[kind]
  rope = values.get('rope_parameters')
  rope = rope if isinstance(rope, Mapping) else {}
  given = {**_DEFAULTS, **layout.defaults, **rope, **values}
  lines = _strangers(values)
  lines += [
    f'{key}={given.get(key)!r}: it must be {value!r}'
    for key, value in {**_FIXED, **layout.fixed}.items()
    if given.get(key) != value
  ]
  found = {**_OURS, **layout.implied}
  for key, name in {**_KEYS, **layout.keys}.items():
    if key == 'num_key_value_heads':
      given.setdefault(key, found.get('model.num_heads'))
    value, problem = _checked(key, given.get(key))
    lines += [f'{key}={value!r}: it must be {problem}'] * bool(problem)
    found[name] = value
  if not lines:
    lines += _derive(kind, given, found)
  if lines:
    raise ValueError('\n'.join(lines))
  return found


def _strangers(values: Mapping[str, Any]) -> list[str]:
  """Returns a line for each property that no layout knows."""
  lines = []
  if 'auto_map' in values:
    lines.append(
      'auto_map: it names code of the model, which is not run; it must be '
      'absent'
    )
  # Versions 4 and 5 of transformers have different keys.
  for key in ('rope_scaling', 'rope_parameters'):
    rope = values.get(key) or {}
    if not isinstance(rope, Mapping):
      lines.append(f'{key}={rope!r}: it must be an object')
      continue
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind != 'default':
      lines.append(f"{key}: rope_type={kind!r}; it must be 'default'")
  kinds = values.get('layer_types') or []
  if any(kind != 'full_attention' for kind in kinds):
    lines.append(f"layer_types={kinds!r}: all must be 'full_attention'")
  return lines


def _checked(key: str, value: Any) -> tuple[Any, str]:
  """Returns a value, and what it must be if it is wrong."""
  if key in ('tie_word_embeddings', 'norm_topk_prob'):
    return value, '' if isinstance(value, bool) else 'true or false'
  if key == 'routed_scaling_factor':
    is_right = type(value) in (int, float) and 0 < value < 1e6
    return value, '' if is_right else 'a number > 0'
  low = 0 if key in _MAY_BE_ZERO else 1
  is_right = type(value) is int and low <= value < 2**31
  return value, '' if is_right else f'an integer >= {low}'


def _derive(
  kind: str, given: Mapping[str, Any], found: dict[str, Any]
) -> list[str]:
  """Sets values that several keys decide; returns a line for each mistake."""
  lines = []
  d_head, rest = divmod(found['model.d_model'], found['model.num_heads'])
  if rest or given.get('head_dim') not in (None, d_head):
    lines.append(
      f'head_dim={given.get("head_dim")!r}: it must be hidden_size / '
      f'num_attention_heads = {given["hidden_size"]} / '
      f'{given["num_attention_heads"]}'
    )
  if not classes.BY_TYPE[kind].has_experts:
    found['moe.first_dense_layers'] = found['model.num_layers']
  first = given.get('mlp_only_layers') or []
  if first != list(range(len(first))):
    lines.append(f'mlp_only_layers={first!r}: they must be the first layers')
  elif 'decoder_sparse_step' in _LAYOUTS[kind].keys:
    found['moe.first_dense_layers'] = len(first)
  if kind == 'qwen2_moe':
    # Width 1 stands for none: this class always has a shared expert.
    width, d_ff = given['shared_expert_intermediate_size'], found['moe.d_ff']
    if type(width) is not int or (width != 1 and width % d_ff):
      lines.append(
        f'shared_expert_intermediate_size={width!r}: it must be a multiple of '
        f'moe_intermediate_size={d_ff}'
      )
    else:
      found['moe.num_shared'] = width // d_ff
  return lines
