"""What a step needs is told before, and when memory runs out; remat."""

import jax
import jax.numpy as jnp
import numpy as np

from nanomoe import experiment


def _gradient(config):
  """(loss, gradient) of a batch as training sees it; bytes of temporaries."""
  task = experiment.build_task(config, 20)
  tokens = np.random.default_rng(0).integers(0, 20, (8, config.block_size + 1))
  batch = {
    'inputs': jnp.asarray(tokens[:, :-1], jnp.int32),
    'targets': jnp.asarray(tokens[:, 1:], jnp.int32),
    'weights': jnp.ones((8, config.block_size), jnp.float32),
  }
  params, _ = task.init(jax.random.key(0), batch)

  def loss(params):
    total, _ = task.loss(params, {}, batch, jax.random.key(1), train=True)
    return total.sum / total.weight

  step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
  return step(params), step.memory_analysis().temp_size_in_bytes


def test_remat_changes_the_memory_alone(tiny):
  """The same parameters and dropout, hence the same loss and gradient."""
  changes = {'model.num_layers': 4, 'block_size': 64, 'precision': 'float32'}
  without, with_it = (
    _gradient(experiment.decide(tiny({**changes, 'model.remat': remat})))
    for remat in ('false', 'true')
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    without[0],
    with_it[0],
  )
  assert with_it[1] < 0.6 * without[1]
