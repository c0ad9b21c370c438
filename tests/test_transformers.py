"""Equal outputs with the weights of Mixtral and Qwen3-MoE."""

import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from configs import base
from nanomoe import experiment
from nanomoe.model.checkpoints import group_features
from nanomoe.model.interfaces import AttentionInputs
from nanomoe.moe import RouterInputs

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

REQUIREMENTS, _ = peers.PEERS['transformers']
DUMP = pathlib.Path(__file__).parent / 'reference' / 'dump_transformers.py'
LAYERS, BLOCK, VOCAB = 3, 24, 61

# As in tests/reference/dump_transformers.py.
COMMON = {
  'block_size': BLOCK,
  'precision': 'float32',
  'model.d_model': 32,
  'model.num_layers': LAYERS,
  'model.num_heads': 4,
  'model.num_kv_heads': 2,
  'model.norm': 'RMSNorm',
  'model.position': 'rope',
  'model.bias': False,
  'moe.num_experts': 4,
  'moe.top_k': 2,
  'moe.d_ff': 48,
  # Softmax over the chosen is softmax over all, renormalized.
  'moe.router.type': 'TopK',
  'moe.activation': 'swiglu',
}
MODELS = {
  'mixtral': {},
  'qwen3_moe': {
    'model.qk_norm': True,
    'model.tie_embeddings': True,
    'moe.every': 2,
    'moe.dense_d_ff': 40,
  },
}


@pytest.fixture(scope='module', params=MODELS)
def name(request):
  return request.param


@pytest.fixture(scope='module')
def peer(name, tmp_path_factory):
  """Weights and outputs of the library's model, from another environment."""
  out = tmp_path_factory.mktemp('peer') / f'{name}.npz'
  python = peers.python_with('transformers', REQUIREMENTS)
  environment = peers.environment(ours=False)
  subprocess.run([python, DUMP, name, out], check=True, env=environment)
  return dict(np.load(out))


@pytest.fixture(scope='module')
def model(name):
  config = base.get_config()
  for key, value in {**COMMON, **MODELS[name]}.items():
    section, _, last = key.rpartition('.')
    (config[section] if section else config)[last] = value
  return experiment.build_task(experiment.resolve_auto(config), VOCAB).model


def _params(peer):
  """Returns the library's weights under the names of this package."""

  def of(name):
    return jnp.asarray(peer[f'{name}.weight'])

  def norm(name):
    return {'scale': of(name)}

  def linear(*names):
    return {'kernel': jnp.concatenate([of(name) for name in names]).T}

  def attention(prefix):
    normed = [n for n in ('q_norm', 'k_norm') if f'{prefix}{n}.weight' in peer]
    return {
      'qkv': jax.tree.map(
        lambda x: group_features(x, 4, 2),
        linear(*(f'{prefix}{x}_proj' for x in 'qkv')),
      ),
      'out': linear(f'{prefix}o_proj'),
      **{name: norm(f'{prefix}{name}') for name in normed},
    }

  def experts(prefix):
    gate, up = np.split(peer[f'{prefix}experts.gate_up_proj'], 2, axis=1)
    down = peer[f'{prefix}experts.down_proj']
    router = {'kernel': of(f'{prefix}gate').T}
    weights = {'w_gate': gate, 'w_in': up, 'w_out': down}
    return {
      'router': router,
      **{k: jnp.asarray(w).swapaxes(1, 2) for k, w in weights.items()},
    }

  def dense(prefix):
    names = {'w_gate': 'gate', 'w_in': 'up', 'w_out': 'down'}
    return {k: of(f'{prefix}{x}_proj').T[None] for k, x in names.items()}

  def block(i):
    prefix = f'model.layers.{i}.'
    routed = f'{prefix}mlp.gate.weight' in peer
    name, make = ('moe', experts) if routed else ('feed_forward', dense)
    return {
      'attention_norm': norm(f'{prefix}input_layernorm'),
      'attention': attention(f'{prefix}self_attn.'),
      'feed_forward_norm': norm(f'{prefix}post_attention_layernorm'),
      name: make(f'{prefix}mlp.'),
    }

  return {
    'token_embedding': of('model.embed_tokens'),
    **{f'block_{i}': block(i) for i in range(LAYERS)},
    'final_norm': norm('model.norm'),
  }


def test_attention_of_each_layer(model, peer):
  """Grouped queries are rotated, and in Qwen3 normalized before."""
  params = _params(peer)
  for i, block in enumerate(model.blocks):
    key = f'model.layers.{i}.self_attn'
    attention = block.keywords['attention']()
    variables = {'params': params[f'block_{i}']['attention']}
    x = jnp.asarray(peer[f'{key}.x'])
    y, _ = attention.apply(variables, x, AttentionInputs(), train=False)
    np.testing.assert_allclose(y, peer[f'{key}.y'], atol=1e-4)


def test_feed_forward_of_each_layer(model, peer):
  params = _params(peer)
  tokens = jnp.asarray(peer['tokens'], jnp.int32)
  inputs = RouterInputs(tokens, jnp.ones(tokens.shape, bool))
  for i, block in enumerate(model.blocks):
    key = f'model.layers.{i}.mlp'
    feed_forward = block.keywords['feed_forward']()
    variables = {'params': params[f'block_{i}'][feed_forward.name]}
    x = jnp.asarray(peer[f'{key}.x'])
    y, _ = feed_forward.apply(variables, x, inputs, train=False)
    np.testing.assert_allclose(y, peer[f'{key}.y'], atol=1e-4)


def test_logits(model, peer, name):
  params = _params(peer)
  if name == 'mixtral':
    params['head'] = {'kernel': jnp.asarray(peer['lm_head.weight']).T}
  tokens = jnp.asarray(peer['tokens'], jnp.int32)
  mask = jnp.ones(tokens.shape, bool)
  like = jax.eval_shape(
    lambda: model.init(jax.random.key(0), tokens, mask, train=False)['params']
  )
  assert jax.tree.structure(like) == jax.tree.structure(params)
  logits, *_ = model.apply({'params': params}, tokens, mask, train=False)
  assert np.std(peer['logits']) > 0.5
  np.testing.assert_allclose(logits, peer['logits'], atol=1e-4)
