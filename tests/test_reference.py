"""Our model with the parameters of nano-moe-jax computes what it computes."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from nanomoe import experiment
from nanomoe.model.checkpoints import group_features
from trainers import metrics as metrics_lib

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


@pytest.fixture(scope='module')
def peer(tmp_path_factory):
  """What nano-moe-jax 0.1.0 has and does, from an environment of its own."""
  directory = tmp_path_factory.mktemp('peer')
  python = directory / 'venv' / 'bin' / 'python'
  subprocess.run([sys.executable, '-m', 'venv', directory / 'venv'], check=True)
  subprocess.run(
    [python, '-m', 'pip', 'install', '-q', 'nano-moe-jax==0.1.0'], check=True
  )
  script = pathlib.Path(__file__).parent / 'reference' / 'dump_nano_moe_jax.py'
  subprocess.run([python, script, directory / 'peer.npz'], check=True)
  return dict(np.load(directory / 'peer.npz'))


def _ours(peer):
  """The peer's parameters under our names."""

  def of(prefix):
    return {
      name.removeprefix(prefix): value
      for name, value in peer.items()
      if name.startswith(prefix)
    }

  def norm(prefix):
    values = of(prefix)
    return {'scale': values['scale'], 'bias': values['bias']}

  def block(i):
    attention = f'block_{i}/MultiHeadAttention_0/'
    moe = f'block_{i}/MoELayer_0/'

    def experts(name):
      return np.stack([peer[f'{moe}expert_{e}/{name}'] for e in range(4)])

    return {
      'attention_norm': norm(f'block_{i}/LayerNorm_0/'),
      'attention': {
        'qkv': {
          name: group_features(jnp.asarray(x), 4, 4)
          for name, x in of(f'{attention}Dense_0/').items()
        },
        'out': of(f'{attention}Dense_1/'),
      },
      'feed_forward_norm': norm(f'block_{i}/LayerNorm_1/'),
      'moe': {
        'router': {'kernel': peer[f'{moe}Router_0/Dense_0/kernel']},
        'w_in': experts('Dense_0/kernel'),
        'b_in': experts('Dense_0/bias'),
        'w_out': experts('Dense_1/kernel'),
        'b_out': experts('Dense_1/bias'),
      },
    }

  return {
    'token_embedding': peer['Embed_0/embedding'],
    'position_embedding': peer['pos_emb'][0],
    **{f'block_{i}': block(i) for i in range(4)},
    'final_norm': norm('LayerNorm_0/'),
    'head': of('Dense_0/'),
  }


@pytest.mark.parametrize('dispatch', ['dense', 'dropless'])
def test_same_logits_and_auxiliary_loss(peer, dispatch):
  config = base.get_config()
  config.precision, config.moe.dispatch = 'float32', dispatch
  task = experiment.build_task(config, vocab_size=65)
  tokens = jnp.asarray(peer['tokens'], jnp.int32)
  batch = {
    'inputs': tokens,
    'targets': tokens,
    'weights': jnp.ones(tokens.shape),
  }
  params = jax.tree.map(jnp.asarray, _ours(peer))
  like, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  assert jax.tree.structure(like) == jax.tree.structure(params)
  np.testing.assert_allclose(
    task.logits((params, {}), tokens)[0], peer['logits'], atol=1e-5
  )
  _, state = task.init(jax.random.key(0), batch)
  _, aux = task.loss(params, state, batch, jax.random.key(0), train=False)
  aux_loss = metrics_lib.compute(aux.metrics)['aux_loss']
  assert aux_loss == pytest.approx(float(peer['aux_loss']), abs=1e-5)
