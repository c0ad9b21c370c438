"""Chunked logits: the loss and gradients of the whole, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment
from nanomoe.model.heads import tied
from nanomoe.ops.chunks import map_chunks
from nanomoe.ops.cross_entropy import cross_entropy
from tests.routed import QUICKLY
from tests.shrunk import mostly_slow

VOCAB, TIME = 11, 16


@pytest.mark.parametrize('size', mostly_slow([1, 5, 16, 99], 16))
def test_chunks_are_of_any_size(rng, size):
  x = jnp.asarray(rng.normal(size=(2, 13, 3)), jnp.float32)
  y = jnp.asarray(rng.normal(size=(2, 13)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(3,)), jnp.float32)

  def run(mapped, w, x):
    fn = lambda x, y: {'a': jnp.sin(x @ w) * y, 'b': x * y[..., None]}  # noqa: E731
    return fn(x, y) if not mapped else map_chunks(fn, size, x, y)

  def total(mapped, w, x):
    return sum(jnp.sum(v**2) for v in run(mapped, w, x).values())

  for fn in (run, jax.grad(total, argnums=(1, 2))):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      fn(True, w, x),
      fn(False, w, x),
    )


def _gradient(config, train):
  """Returns the metrics, and (loss, gradient), of a batch with padding."""
  task = experiment.build_task(experiment.resolve_auto(config), VOCAB)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (3, TIME + 1))
  weights = np.ones((3, TIME), np.float32)
  weights[1, 9:] = 0
  batch = {
    'inputs': jnp.asarray(tokens[:, :-1], jnp.int32),
    'targets': jnp.asarray(tokens[:, 1:], jnp.int32),
    'weights': weights,
  }
  params, state = QUICKLY(task.init)(jax.random.key(0), batch)
  params = jax.tree.map(lambda x: 3 * x, params)

  def loss(params):
    key = jax.random.key(1)
    total, aux = task.loss(params, state, batch, key, train=train)
    return total.sum / total.weight, aux.metrics

  (value, metrics), gradient = QUICKLY(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  return metrics, (value, gradient)


CHOICES = {
  'biased': {'model.bias': True},
  'tied': {'model.tie_embeddings': True, 'model.logit_softcap': 2.0},
  'bfloat16': {'precision': 'bfloat16'},
  'tied_bfloat16': {'precision': 'bfloat16', 'model.tie_embeddings': True},
}


@pytest.mark.parametrize(
  ('choice', 'train'),
  [
    pytest.param(
      choice,
      train,
      marks=() if choice == 'biased' and train else pytest.mark.slow,
    )
    for choice in CHOICES
    for train in (True, False)
  ],
)
def test_chunks_change_neither_the_loss_nor_its_gradient(tiny, choice, train):
  changes = {'precision': 'float32', 'confidence_weight': 0.3}
  changes |= {'model.num_layers': 1, 'moe.first_dense_layers': 1}
  changes |= CHOICES[choice]
  (metrics, whole), (chunked_metrics, chunked) = (
    _gradient(tiny({**changes, 'model.logits_chunk': size}), train)
    for size in (0, 6)
  )
  assert 'prediction_entropy' in metrics
  for name, mean in metrics.items():
    for one, other in zip(mean, chunked_metrics[name], strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-6, err_msg=name)
  np.testing.assert_allclose(whole[0], chunked[0], rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    whole[1],
    chunked[1],
  )


def _temporaries(size, vocab=2048, d_model=16, batch=2, time=256):
  """Returns the bytes of temporaries of a loss and its gradient."""

  def loss(embedding, x, targets):
    head = tied(embedding, use_bias=False, precision='float32')

    def fn(x, targets):
      return cross_entropy(head(x), targets)

    if not size:
      return fn(x, targets).sum()
    return map_chunks(fn, size, x, targets).sum()

  shapes = (
    jax.ShapeDtypeStruct((vocab, d_model), jnp.float32),
    jax.ShapeDtypeStruct((batch, time, d_model), jnp.float32),
    jax.ShapeDtypeStruct((batch, time), jnp.int32),
  )
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  analysis = step.lower(*shapes).compile().memory_analysis()
  return analysis.temp_size_in_bytes


def test_temporaries_fall_with_the_chunk():
  """The logits dominate: 4 MB of them, beside 0.1 MB of anything else."""
  whole, quarter, sixteenth = (_temporaries(size) for size in (0, 64, 16))
  # Unoptimized programs keep more arrays of a chunk than of the whole.
  assert quarter < 0.45 * whole
  assert sixteenth < 0.35 * quarter


@pytest.mark.slow
@pytest.mark.optimized
def test_the_loss_of_a_large_vocabulary_needs_less_than_a_gigabyte():
  sizes = {'vocab': 50_304, 'd_model': 768, 'batch': 8, 'time': 1024}
  assert _temporaries(64, **sizes) < 1e9 < _temporaries(0, **sizes)
