"""Classes of Hugging Face transformers that compute models of this package.

A class is chosen by the config alone. An option that no class has is one line,
with the value that would fit.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from nanomoe.config import layers
from nanomoe.config.schema import Config
from nanomoe.data.tokenizers import TOKENIZERS

# Values that every class needs, by config key.
NEEDED = {
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


def problems(
  config: Config, reason: str = 'no class of transformers has it'
) -> list[str]:
  """Returns a line for each key that keeps a model from having a class.

  The last line names the nearest config of this package.

  Args:
    config: Config of a run.
    reason: Reason that the lines give.
  """
  lines = list(_problems(config, reason))
  if lines:
    lines.append(f'the nearest config that can be exported is {_near(config)}')
  return lines


def _problems(config: Config, reason: str) -> Iterator[str]:
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
  for key, value in NEEDED.items():
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
