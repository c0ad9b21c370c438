"""Classes of Hugging Face transformers that compute models of this package.

A class is chosen by the config alone. An option that no class has is one line,
with the value that would fit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from nanomoe.config import layers
from nanomoe.config.schema import Config
from nanomoe.data.tokenizers import TOKENIZERS
from nanomoe.model.norms import EPSILON
from nanomoe.model.positions import THETA

# Values that every class needs, by config key.
_NEEDED = {
  'model.norm': 'RMSNorm',
  'model.position': 'rope',
  'model.bias': False,
  'moe.activation': 'swiglu',
  'model.conv_width': 1,
  'model.max_ngram': 1,
  'model.logit_softcap': 0.0,
  'model.attention.type': 'CausalSelfAttention',
}
# Routers by what transformers calls them. Noise is for training alone.
_ROUTERS = {
  'TopK': 'normalized',
  'NoisyTopK': 'normalized',
  'Softmax': 'softmax',
  'Sigmoid': 'sigmoid',
}


class Facts(NamedTuple):
  """Properties of a config by which a class is chosen.

  Attributes:
    router: 'none' (a dense model), 'normalized', 'softmax' or 'sigmoid'.
    qk_norm: Whether queries and keys are normalized.
    num_shared: Number of shared experts.
    dense: Indices of the layers without experts.
    first: Value of `moe.first_dense_layers`.
    every: Value of `moe.every`.
  """

  router: str
  qk_norm: bool
  num_shared: int
  dense: tuple[int, ...]
  first: int
  every: int


class HFClass(NamedTuple):
  """Class of transformers.

  Attributes:
    model_type: Value of `model_type` in a config.json.
    name: Name of the class of the causal language model.
    fits: Whether the class computes a model with the given facts.
    has_experts: Whether the class has layers of experts.
    experts: Prefix of a layer's router and experts.
    projections: Names of an expert's gate, input and output projections.
    shared: Name of the shared expert in a layer; '' without one.
  """

  model_type: str
  name: str
  fits: Callable[[Facts], bool]
  has_experts: bool = True
  experts: str = 'mlp'
  projections: tuple[str, str, str] = ('gate_proj', 'up_proj', 'down_proj')
  shared: str = ''


_SOFTMAX = ('normalized', 'softmax')

# The first class that fits is used.
CLASSES = (
  HFClass(
    'llama',
    'LlamaForCausalLM',
    lambda f: f.router == 'none' and not f.qk_norm,
    has_experts=False,
  ),
  HFClass(
    'qwen3',
    'Qwen3ForCausalLM',
    lambda f: f.router == 'none' and f.qk_norm,
    has_experts=False,
  ),
  HFClass(
    'mixtral',
    'MixtralForCausalLM',
    lambda f: (
      f.router == 'normalized' and not (f.qk_norm or f.num_shared or f.dense)
    ),
    experts='block_sparse_moe',
    projections=('w1', 'w3', 'w2'),
  ),
  HFClass(
    'qwen3_moe',
    'Qwen3MoeForCausalLM',
    lambda f: f.router in _SOFTMAX and f.qk_norm and not f.num_shared,
  ),
  HFClass(
    'qwen2_moe',
    'Qwen2MoeForCausalLM',
    lambda f: f.router in _SOFTMAX and not f.qk_norm,
    shared='shared_expert',
  ),
  HFClass(
    'dots1',
    'Dots1ForCausalLM',
    lambda f: f.router == 'sigmoid' and f.qk_norm and f.every == 1,
    shared='shared_experts',
  ),
  HFClass(
    'glm4_moe',
    'Glm4MoeForCausalLM',
    lambda f: f.router == 'sigmoid' and not f.qk_norm and f.every == 1,
    shared='shared_experts',
  ),
)
BY_TYPE = {hf.model_type: hf for hf in CLASSES}


def facts(config: Config) -> Facts:
  """Returns the properties of a config by which a class is chosen."""
  model, moe = config.model, config.moe
  sparse = layers.with_experts(
    model.num_layers, moe.first_dense_layers, moe.every
  )
  router = _ROUTERS.get(moe.router.type, '') if sparse else 'none'
  if router == 'softmax' and moe.router.get('renormalize', False):
    router = 'normalized'
  return Facts(
    router,
    model.qk_norm,
    moe.num_shared if sparse else 0,
    tuple(i for i in range(model.num_layers) if i not in sparse),
    moe.first_dense_layers,
    moe.every,
  )


def find(config: Config) -> HFClass | None:
  """Returns the class that computes the model of a config, or None."""
  found = facts(config)
  return next((hf for hf in CLASSES if hf.fits(found)), None)


def problems(config: Config) -> list[str]:
  """Returns a line for each key that keeps a model from having a class.

  The last line names the nearest config of this package.

  Args:
    config: Config of a run.
  """
  lines = list(_problems(config))
  if lines:
    lines.append(f'the nearest config that can be exported is {_near(config)}')
  return lines


def _problems(config: Config) -> Iterator[str]:
  flat = {
    **{f'model.{k}': v for k, v in config.model.items()},
    **{f'moe.{k}': v for k, v in config.moe.items()},
    'model.attention.type': config.model.attention.type,
  }
  kind = config.data.tokenizer.type
  if kind not in TOKENIZERS:  # Reading the run would import it.
    yield (
      f'data.tokenizer.type={kind!r}: no tokenizer.json has its tokens; it '
      f'must be one of {", ".join(map(repr, TOKENIZERS))}'
    )
  reason = 'no class of transformers has it'
  for key, value in _NEEDED.items():
    if flat[key] != value:
      yield f'{key}={flat[key]!r}: {reason}; it must be {value!r}'
  found = facts(config)
  if found.router == 'none':
    return
  moe = config.moe
  router = moe.router.type
  if not found.router:
    yield (
      f'moe.router.type={router!r}: {reason}; it must be one of '
      f'{", ".join(map(repr, _ROUTERS))}'
    )
  scale = moe.router.get('route_scale', 1.0)
  if found.router in _SOFTMAX and scale != 1:
    yield f'moe.router.route_scale={scale}: {reason}; it must be 1.0'
  for key in ('dispatch', 'eval_dispatch'):
    # An evaluation of a run drops tokens too if its dispatch does.
    other = moe.eval_dispatch if key == 'dispatch' else 'capacity'
    if moe[key] == 'capacity' and other in ('', 'capacity'):
      yield (
        f"moe.{key}='capacity': {reason}, since it drops tokens; set "
        "moe.eval_dispatch='dropless'"
      )
  if found.router == 'sigmoid':
    if found.every != 1:
      yield (
        f"moe.every={found.every}: {reason} with moe.router.type='Sigmoid'; it "
        'must be 1'
      )
    groups = int(getattr(moe.router, 'num_groups', 1))
    if moe.num_experts // groups < 2:
      yield (
        f'moe.router.num_groups={groups}: {reason} with groups of one expert; '
        f'it must be at most {max(moe.num_experts // 2, 1)}'
      )
  if found.router in _SOFTMAX and found.qk_norm and found.num_shared:
    yield (
      f'moe.num_shared={found.num_shared}: {reason} with model.qk_norm=True '
      f'and moe.router.type={router!r}; it must be 0'
    )


def _near(config: Config) -> str:
  """Returns the config of this package that resembles `config` most."""
  if config.moe.router.type == 'Sigmoid' or config.moe.num_shared:
    return 'configs/deepseek_nano.py'
  name = 'qwen3_nano' if config.model.qk_norm else 'mixtral_nano'
  return f'configs/{name}.py'


def hf_config(config: Config, vocab_size: int, dtype: str) -> dict[str, Any]:
  """Returns the value of config.json for a model that has a class.

  Args:
    config: Config of the run, without problems.
    vocab_size: Number of rows of the embedding.
    dtype: Type of the weights, 'float32' or 'bfloat16'.
  """
  hf, found = find(config), facts(config)
  assert hf, 'problems() is empty'
  model, moe = config.model, config.moe
  shared = found.num_shared * moe.d_ff
  rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': THETA}
  if hf.model_type == 'glm4_moe':
    rope['partial_rotary_factor'] = 1.0
  of_softmax = {
    'num_experts': moe.num_experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.d_ff,
    'norm_topk_prob': found.router == 'normalized',
    'decoder_sparse_step': found.every,
    'mlp_only_layers': [i for i in found.dense if i < found.first],
    'use_sliding_window': False,
  }
  of_sigmoid = {
    'n_routed_experts': moe.num_experts,
    'num_experts_per_tok': moe.top_k,
    'moe_intermediate_size': moe.d_ff,
    'n_shared_experts': found.num_shared or 1,
    'norm_topk_prob': True,
    'routed_scaling_factor': moe.router.get('route_scale', 1.0),
    'n_group': moe.router.get('num_groups', 1),
    'topk_group': moe.router.get('groups_kept', 1),
    'first_k_dense_replace': found.first,
  }
  own: dict[str, dict[str, Any]] = {
    'llama': {'mlp_bias': False},
    'qwen3': {'use_sliding_window': False},
    'mixtral': {
      'intermediate_size': moe.d_ff,
      'num_local_experts': moe.num_experts,
      'num_experts_per_tok': moe.top_k,
      'sliding_window': None,
    },
    'qwen3_moe': of_softmax,
    'qwen2_moe': {
      **of_softmax,
      'shared_expert_intermediate_size': shared or 1,
      'qkv_bias': False,
    },
    'dots1': {**of_sigmoid, 'sliding_window': None},
    'glm4_moe': {
      **of_sigmoid,
      'use_qk_norm': False,
      'partial_rotary_factor': 1.0,
      'num_nextn_predict_layers': 0,
    },
  }
  return {
    'architectures': [hf.name],
    'model_type': hf.model_type,
    'vocab_size': vocab_size,
    'hidden_size': model.d_model,
    'intermediate_size': moe.dense_d_ff,
    'num_hidden_layers': model.num_layers,
    'num_attention_heads': model.num_heads,
    'num_key_value_heads': model.num_kv_heads or model.num_heads,
    'head_dim': model.d_model // model.num_heads,
    'hidden_act': 'silu',
    'max_position_embeddings': config.block_size,
    'rms_norm_eps': EPSILON,
    'rope_theta': THETA,
    'rope_parameters': rope,
    'attention_bias': False,
    'attention_dropout': 0.0,
    'tie_word_embeddings': model.tie_embeddings,
    'torch_dtype': dtype,
    'dtype': dtype,
    'bos_token_id': None,
    'eos_token_id': None,
    'pad_token_id': None,
    **own[hf.model_type],
  }


# Values of config.json that the models of this package have, by key. Several
# are allowed where a value means the same.
_ALLOWED: dict[str, tuple[Any, ...]] = {
  'hidden_act': ('silu', 'swish'),
  'rms_norm_eps': (EPSILON,),
  'rope_theta': (THETA,),
  'rope_scaling': (None,),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'qkv_bias': (False,),
  'use_sliding_window': (False,),
}
# Values of keys that a config.json may lack.
_DEFAULTS: dict[str, dict[str, Any]] = {
  'mixtral': {
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e6,
    'num_key_value_heads': 8,
    'num_local_experts': 8,
    'num_experts_per_tok': 2,
  },
  'qwen2_moe': {
    'qkv_bias': True,
    'num_key_value_heads': 16,
    'num_experts_per_tok': 4,
  },
  'qwen3': {'num_key_value_heads': 32, 'head_dim': 128},
  'qwen3_moe': {'num_key_value_heads': 4, 'num_experts_per_tok': 8},
  'dots1': {'num_key_value_heads': 32},
  'glm4_moe': {
    'rms_norm_eps': 1e-5,
    'num_key_value_heads': 8,
    'num_experts_per_tok': 8,
  },
}
_MISSING = object()


def from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of a config by dotted key, as of `hf_config`'s inverse.

  Args:
    values: Value of a config.json.

  Raises:
    ValueError: A line for each property that this package lacks.
  """
  hf = BY_TYPE.get(str(values.get('model_type')))
  if hf is None:
    raise ValueError(
      f'model_type={values.get("model_type")!r}: it must be one of '
      f'{", ".join(BY_TYPE)}'
    )
  rope = values.get('rope_parameters')
  rope = rope if isinstance(rope, Mapping) else {}
  # One of the two places is enough.
  theta = {k: v for k, v in rope.items() if k not in values}
  reader = _Reader({**_DEFAULTS.get(hf.model_type, {}), **theta, **values})
  found = _from_hf(hf, reader)
  if reader.lines:
    raise ValueError('\n'.join(reader.lines))
  return found


class _Reader:
  """Reader of the values of a config.json that collects mistakes.

  Args:
    values: Value of the config.json.
  """

  def __init__(self, values: Mapping[str, Any]):
    self.values = dict(values)
    self.lines: list[str] = []
    rope = self.values.get('rope_parameters')
    if isinstance(rope, Mapping):
      kind = rope.get('rope_type', 'default')
      if kind != 'default':
        self.lines.append(f"rope_type={kind!r}: it must be 'default'")
    if 'auto_map' in self.values:
      self.lines.append(
        'auto_map: it names code of the model, which is not run; it must be '
        'absent'
      )
    kinds = self.values.get('layer_types') or []
    if any(kind != 'full_attention' for kind in kinds):
      self.lines.append(
        f"layer_types={kinds!r}: all of them must be 'full_attention'"
      )
    for key, allowed in _ALLOWED.items():
      value = self.values.get(key, allowed[0])
      if value not in allowed:
        self.lines.append(f'{key}={value!r}: it must be {allowed[0]!r}')

  def integer(self, key: str, default: Any = _MISSING, low: int = 1) -> int:
    """Returns an integer that is at least `low`."""
    value = self.values.get(key, default)
    if value is None and default is not _MISSING:
      value = default
    if type(value) is int and low <= value < 2**31:
      return value
    shown = 'missing' if value is _MISSING else repr(value)[:60]
    self.lines.append(f'{key}={shown}: it must be an integer >= {low}')
    return low

  def require(self, key: str, value: Any, default: Any) -> None:
    """Notes a mistake if a key has another value."""
    found = self.values.get(key, default)
    if found != value:
      self.lines.append(f'{key}={found!r}: it must be {value!r}')


def _from_hf(hf: HFClass, read: _Reader) -> dict[str, Any]:
  num_layers = read.integer('num_hidden_layers')
  d_model, num_heads = (
    read.integer('hidden_size'),
    read.integer('num_attention_heads'),
  )
  if d_model % num_heads:
    read.lines.append(
      f'num_attention_heads={num_heads}: it must divide hidden_size={d_model}'
    )
  else:
    default = d_model // num_heads
    if read.integer('head_dim', default) != d_model // num_heads:
      read.lines.append(
        f'head_dim={read.integer("head_dim", default)}: it must be '
        f'hidden_size / num_attention_heads = {d_model // num_heads}'
      )
  kind = hf.model_type
  found: dict[str, Any] = {
    'model.d_model': d_model,
    'model.num_layers': num_layers,
    'model.num_heads': num_heads,
    'model.num_kv_heads': read.integer('num_key_value_heads', num_heads),
    'model.norm': 'RMSNorm',
    'model.position': 'rope',
    'model.bias': False,
    'model.qk_norm': kind in ('qwen3', 'qwen3_moe', 'dots1'),
    'model.tie_embeddings': bool(read.values.get('tie_word_embeddings', False)),
    'model.conv_width': 1,
    'model.max_ngram': 1,
    'model.logit_softcap': 0.0,
    'block_size': read.integer('max_position_embeddings', 2048),
    'moe.activation': 'swiglu',
    'moe.num_shared': 0,
    'moe.every': 1,
    'moe.first_dense_layers': 0,
  }
  if kind in ('mixtral', 'dots1'):
    read.require('sliding_window', None, 4096 if kind == 'dots1' else None)
  if kind in ('llama', 'qwen3'):
    found |= {
      'moe.first_dense_layers': num_layers,
      'moe.dense_d_ff': read.integer('intermediate_size'),
    }
  elif kind == 'mixtral':
    found |= {
      'moe.num_experts': read.integer('num_local_experts'),
      'moe.d_ff': read.integer('intermediate_size'),
      'moe.router.type': 'Softmax',
      'moe.router.renormalize': True,
    }
  elif kind in ('qwen2_moe', 'qwen3_moe'):
    first = read.values.get('mlp_only_layers') or []
    every = read.integer('decoder_sparse_step', 1)
    if first != list(range(len(first))):
      read.lines.append(
        f'mlp_only_layers={first}: they must be the first layers'
      )
    found |= {
      'moe.num_experts': read.integer('num_experts'),
      'moe.d_ff': read.integer('moe_intermediate_size'),
      'moe.dense_d_ff': read.integer('intermediate_size'),
      'moe.every': every,
      'moe.first_dense_layers': len(first),
      'moe.router.type': 'Softmax',
      'moe.router.renormalize': bool(read.values.get('norm_topk_prob', False)),
    }
    if kind == 'qwen2_moe':
      found['moe.num_shared'] = _num_shared(
        read,
        read.integer('shared_expert_intermediate_size', 5632),
        found['moe.d_ff'],
      )
  else:
    read.require('norm_topk_prob', True, kind == 'glm4_moe')
    if kind == 'glm4_moe':
      read.require('use_qk_norm', False, False)
      read.require('partial_rotary_factor', 1.0, 0.5)
    scale = read.values.get('routed_scaling_factor', 1.0)
    found |= {
      'moe.num_experts': read.integer('n_routed_experts'),
      'moe.d_ff': read.integer('moe_intermediate_size'),
      'moe.dense_d_ff': read.integer('intermediate_size'),
      'moe.num_shared': read.integer('n_shared_experts', 1, 0),
      'moe.first_dense_layers': read.integer('first_k_dense_replace', 0, 0),
      'moe.router.type': 'Sigmoid',
      'moe.router.num_groups': read.integer('n_group', 1),
      'moe.router.groups_kept': read.integer('topk_group', 1),
      'moe.router.route_scale': scale,
    }
  if 'moe.num_experts' in found:
    found['moe.top_k'] = read.integer('num_experts_per_tok')
  return found


def _num_shared(read: _Reader, width: int, d_ff: int) -> int:
  """Returns the number of shared experts of a total width.

  Width 1 stands for none: transformers always has a shared expert.
  """
  if width % d_ff and width > 1:
    read.lines.append(
      f'shared_expert_intermediate_size={width}: it must be a multiple of '
      f'moe_intermediate_size={d_ff}'
    )
  return width // d_ff
