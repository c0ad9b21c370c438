"""Small models of each class of transformers, with weights far from linear."""

import json
import pathlib
import string
from typing import Any, NamedTuple

import jax
import numpy as np

from configs import base
from nanomoe.config import overrides, schema
from nanomoe.data import tokenizer_files
from nanomoe.data.tokenizers import Characters
from nanomoe.portable import model
from nanomoe.task import build_task
from trainers.runtime import keys

TEXT = ''.join(
  np.random.default_rng(0).choice(list(string.ascii_letters + ' \n'), 600)
)
COMMON = {
  'block_size': 24,
  'precision': 'float32',
  'model.d_model': 32,
  'model.num_layers': 3,
  'model.num_heads': 4,
  'model.num_kv_heads': 2,
  'model.norm': 'RMSNorm',
  'model.position': 'rope',
  'model.bias': False,
  'moe.num_experts': 8,
  'moe.d_ff': 24,
  'moe.dense_d_ff': 40,
  'moe.activation': 'swiglu',
  'moe.dispatch': 'dropless',
}
_QK_NORM = {'model.qk_norm': True}
_SOFTMAX = {'moe.router.type': 'Softmax'}
_NORMALIZED = {**_SOFTMAX, 'moe.router.renormalize': True}
_SIGMOID = {
  'moe.router.type': 'Sigmoid',
  'moe.router.num_groups': 4,
  'moe.router.groups_kept': 2,
  'moe.router.route_scale': 2.5,
  'moe.top_k': 3,
}
CASES: dict[str, dict[str, Any]] = {
  'mixtral': {},
  'mixtral-noisy-tied': {
    'moe.router.type': 'NoisyTopK',
    'model.tie_embeddings': True,
    'model.vocab_rows': 64,
  },
  'qwen3_moe': {**_NORMALIZED, **_QK_NORM},
  'qwen3_moe-tied': {
    **_NORMALIZED,
    **_QK_NORM,
    'model.tie_embeddings': True,
    'model.vocab_rows': 64,
  },
  'qwen3_moe-dense': {
    **_SOFTMAX,
    **_QK_NORM,
    'moe.every': 2,
    'moe.first_dense_layers': 1,
    'model.tie_embeddings': True,
  },
  'qwen2_moe': {**_SOFTMAX, 'moe.num_shared': 2},
  'qwen2_moe-unshared': {**_NORMALIZED, 'moe.first_dense_layers': 1},
  'dots1': {
    **_SIGMOID,
    **_QK_NORM,
    'moe.num_shared': 2,
    'moe.first_dense_layers': 1,
  },
  'dots1-unshared': {**_SIGMOID, **_QK_NORM, 'moe.router.bias_rate': 0.0},
  'glm4_moe': {
    **_SIGMOID,
    'moe.num_shared': 1,
    'moe.first_dense_layers': 1,
    'model.num_kv_heads': 0,
  },
  'llama': {'moe.first_dense_layers': 3, 'model.tie_embeddings': True},
  'qwen3': {'moe.first_dense_layers': 3, **_QK_NORM},
}


class Case(NamedTuple):
  """Model with its tokenizer.

  Attributes:
    config: Config of the model.
    tokenizer: Tokenizer of the model.
    trained: Weights of the model.
  """

  config: schema.Config
  tokenizer: Characters
  trained: model.Trained


def config_of(changes: dict[str, Any]) -> schema.Config:
  """Returns the config of COMMON with changes."""
  config = base.get_config().to_dict()
  given = {**COMMON, **changes}
  words = sorted(given.items(), key=lambda item: not item[0].endswith('.type'))
  return overrides.apply(
    schema.make(config), [(key, str(value)) for key, value in words]
  )


def make(name: str, directory: pathlib.Path | None = None) -> Case:
  """Returns the model of a case, and writes it if a directory is given."""
  config = config_of(CASES[name])
  tokenizer = Characters()
  tokenizer.fit({'train': TEXT})
  task = build_task(config, tokenizer.vocab_size)
  batch = {'inputs': np.zeros((1, config.block_size), np.int32)}
  params, state = jax.eval_shape(task.init, keys.make(0), batch)
  rng = np.random.default_rng(1)

  def draw(x):
    # Large enough that no layer is close to the identity; no scale is 1.
    width = x.shape[-2] if x.ndim > 1 else 16
    noise = rng.normal(size=x.shape) * 1.5 * width**-0.5
    return np.asarray(noise + (x.ndim == 1), np.float32)

  params = jax.tree.map(draw, params)
  if 'bias' in state:  # Large enough that it selects, with either sign.
    bias = rng.normal(size=state['bias'].shape).astype(np.float32)
    state = {**state, 'bias': bias}
  case = Case(config, tokenizer, model.trained(params, state))
  if directory:
    directory.mkdir(parents=True)
    num_tokens = tokenizer.vocab_size
    model.write(directory, case.trained, config, 'float32', num_tokens, 30_000)
    for file, value in (
      ('tokenizer.json', tokenizer_files.to_json(tokenizer)),
      ('tokenizer_config.json', tokenizer_files.tokenizer_config(24)),
    ):
      (directory / file).write_text(json.dumps(value))
  return case
