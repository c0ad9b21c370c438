"""The transformer: its size, causality, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from nanomoe import experiment


def test_the_documented_model_has_2409025_parameters():
  config = experiment.decide(base.get_config())
  task = experiment.build_task(config, vocab_size=65)
  batch = {'inputs': jnp.zeros((1, 128), jnp.int32)}
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  counts = experiment.count_params(params, config)
  # An expert: 128 * 512 + 512 + 512 * 128 + 128 = 131,712; two idle, 4 layers.
  assert counts == {
    'num_params': 2_409_025,
    'num_active_params': 2_409_025 - 4 * 2 * 131_712,
  }


@pytest.fixture
def model(tiny):
  """(logits of tokens and mask, whose rows of d_model are far from linear)."""
  config = experiment.decide(tiny({'precision': 'float32'}))
  task = experiment.build_task(config, vocab_size=11)
  batch = {'inputs': jnp.zeros((1, 16), jnp.int32)}
  params, _ = task.init(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: 3 * x, params)

  @jax.jit
  def logits(tokens, mask):
    return task.model.apply({'params': params}, tokens, mask, train=False)[0]

  return logits


def test_no_logit_sees_the_future_or_another_sequence(model, rng):
  tokens = jnp.asarray(rng.integers(0, 11, (3, 16)))
  mask = jnp.ones((3, 16), bool)
  before = model(tokens, mask)
  for t in range(1, 16):
    after = model(tokens.at[:, t:].set((tokens[:, t:] + 1) % 11), mask)
    np.testing.assert_allclose(after[:, :t], before[:, :t], atol=1e-5)
    assert np.abs(after[:, t:] - before[:, t:]).max() > 1e-2
  after = model(tokens.at[1:].set((tokens[1:] + 1) % 11), mask)
  np.testing.assert_allclose(after[0], before[0], atol=1e-5)


def test_the_past_matters_up_to_the_first_token(model, rng):
  tokens = jnp.asarray(rng.integers(0, 11, (3, 16)))
  mask = jnp.ones((3, 16), bool)
  changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % 11)
  difference = model(changed, mask)[:, -1] - model(tokens, mask)[:, -1]
  assert np.abs(difference).max() > 1e-4


def test_what_is_padded_does_not_move_other_logits(model, rng):
  tokens = jnp.asarray(rng.integers(0, 11, (3, 16)))
  mask = jnp.ones((3, 16), bool)
  before = model(tokens, mask)
  after = model(tokens, mask.at[2].set(False))
  np.testing.assert_allclose(after[:2], before[:2], atol=1e-5)
