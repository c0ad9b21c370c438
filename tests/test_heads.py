"""Heads: tied embeddings, and the soft cap of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment
from nanomoe.model.heads import softcap


@pytest.mark.slow
def test_the_gradient_of_a_tied_embedding_is_the_sum_of_both(tiny, rng):
  changes = {'precision': 'float32', 'model.bias': 'false'}
  changes |= {'model.num_layers': 1, 'moe.first_dense_layers': 1}
  tied, own = (
    experiment.build_task(
      experiment.resolve_auto(tiny({**changes, 'model.tie_embeddings': tie})),
      11,
    )
    for tie in ('true', 'false')
  )
  tokens = jnp.asarray(rng.integers(0, 11, (2, 17)), jnp.int32)
  batch = {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': jnp.ones((2, 16)),
  }
  params, _ = jax.jit(tied.init)(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: 3 * x, params)
  same = {**params, 'head': {'kernel': params['token_embedding'].T}}

  def gradient(task, params):
    def loss(params):
      total, _ = task.loss(params, {}, batch, jax.random.key(1), train=False)
      return total.sum / total.weight

    return jax.jit(jax.value_and_grad(loss))(params)

  (loss, of_tied), (expected_loss, of_own) = (
    gradient(tied, params),
    gradient(own, same),
  )
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
  embedding, head = of_own['token_embedding'], of_own['head']['kernel'].T
  assert min(np.abs(embedding).max(), np.abs(head).max()) > 1e-3
  np.testing.assert_allclose(
    of_tied['token_embedding'], embedding + head, rtol=1e-3, atol=1e-6
  )


def test_the_soft_cap_bounds_and_keeps_the_order():
  logits = jnp.array([-1e6, -9.0, -0.1, 0.0, 0.1, 9.0, 1e6])
  capped = softcap(logits, 5.0)
  assert np.abs(capped).max() <= 5
  assert (np.diff(capped) > 0).all()
  np.testing.assert_allclose(capped[2:5], logits[2:5], rtol=1e-3)
  np.testing.assert_allclose(capped[1], -5 * np.tanh(9 / 5), rtol=1e-6)
  np.testing.assert_array_equal(softcap(logits, 0.0), logits)
