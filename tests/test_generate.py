"""Sampling, against a loop in Python that sees one window at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment
from nanomoe.generate import generate

VOCAB = 11
BLOCK = 6


def _normal(*shape):
  return np.random.default_rng(0).standard_normal(shape, np.float32)


_EMBEDDING, _POSITION, _HEAD = np.split(
  _normal(2 * VOCAB + BLOCK, 16), [VOCAB, VOCAB + BLOCK]
)


@jax.jit
def causal(tokens):
  """A model: logits depend on tokens so far, their order and positions."""
  x = jnp.asarray(_EMBEDDING)[tokens] * (1 + _POSITION[: tokens.shape[1]])
  return jnp.tanh(jnp.cumsum(x, axis=1)) @ _HEAD.T


@functools.partial(jax.jit, static_argnums=(0, 3))
def next_tokens(logits, window, key, temperature):
  last = logits(window)[:, -1]
  if temperature:
    return jax.random.categorical(key, last / temperature)
  return jnp.argmax(last, axis=-1)


def naive(logits, prompt, key, *, num_tokens, block_size, temperature):
  """No padding, no fixed shapes: the last `block_size` tokens, every time."""
  tokens = np.asarray(prompt)
  for k in jax.random.split(key, num_tokens):
    new = next_tokens(logits, tokens[:, -block_size:], k, temperature)
    tokens = np.concatenate([tokens, np.asarray(new)[:, None]], axis=1)
  return tokens[:, prompt.shape[1] :]


def prompts(length, batch=3):
  draw = np.random.default_rng(length).integers(0, VOCAB, (batch, length))
  return jnp.asarray(draw, jnp.int32)


@pytest.mark.parametrize('temperature', [0.0, 0.7])
@pytest.mark.parametrize('length', [1, BLOCK - 1, BLOCK, 20])
def test_equals_the_naive_loop_token_for_token(length, temperature):
  arguments = (causal, prompts(length), jax.random.key(5))
  settings = dict(
    num_tokens=3 * BLOCK, block_size=BLOCK, temperature=temperature
  )
  got = generate(*arguments, **settings)
  assert got.shape == (3, 3 * BLOCK)
  np.testing.assert_array_equal(got, naive(*arguments, **settings))
  assert len(np.unique(got)) > 3  # It is no constant that agrees.


def test_equals_the_naive_loop_with_the_model(tiny):
  config = tiny(
    {
      'block_size': 3,
      'model.num_layers': 1,
      'precision': 'float32',
      'moe.dispatch': 'dropless',
    }
  )
  task = experiment.build_task(config, VOCAB)
  batch = {'inputs': np.zeros((1, 3), np.int32)}
  shapes, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  rng = np.random.default_rng(0)

  def draw(path, x):
    # What comes in and what goes out is large: tokens and positions tell.
    name = jax.tree_util.keystr(path)
    size = 1.0 if 'embedding' in name or 'head' in name else 0.2
    values = size * rng.standard_normal(x.shape, np.float32) * (x.ndim > 1)
    return jnp.asarray(values + ('scale' in name), jnp.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  logits = functools.partial(task.logits, params)
  for temperature in (0.0, 1.0):
    settings = dict(num_tokens=9, block_size=3, temperature=temperature)
    got = generate(logits, prompts(2), jax.random.key(2), **settings)
    expected = naive(logits, prompts(2), jax.random.key(2), **settings)
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(got)) > 2


def test_what_a_long_prompt_has_before_the_window_is_not_seen():
  prompt = prompts(15)
  other = prompt.at[:, : 15 - BLOCK].set(0)
  assert not np.array_equal(prompt, other)
  settings = dict(num_tokens=9, block_size=BLOCK, temperature=1.0)
  sample = functools.partial(generate, causal, key=jax.random.key(0))
  np.testing.assert_array_equal(
    sample(prompt, **settings), sample(other, **settings)
  )


def test_the_key_decides():
  settings = dict(num_tokens=20, block_size=BLOCK, temperature=1.0)
  sample = functools.partial(generate, causal, prompts(1), **settings)
  first = sample(jax.random.key(0))
  np.testing.assert_array_equal(first, sample(jax.random.key(0)))
  assert not np.array_equal(first, sample(jax.random.key(1)))
  assert not np.array_equal(first[0], first[1])  # Rows are drawn on their own.


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
  fixed = np.array([0.0, 1.0, -1.0, 2.0, -0.5], np.float32)

  def logits(tokens):
    return jnp.broadcast_to(fixed, (*tokens.shape, len(fixed)))

  tokens = generate(
    logits,
    jnp.zeros((1000, 1), jnp.int32),
    jax.random.key(3),
    num_tokens=20,
    block_size=4,
    temperature=temperature,
  )
  counts = np.bincount(np.ravel(tokens), minlength=len(fixed))
  weights = np.exp(fixed / temperature)
  expected = tokens.size * weights / weights.sum()
  # 4 degrees of freedom: mean 4, and above 24 once in 10,000 keys.
  assert np.sum((counts - expected) ** 2 / expected) < 24


def test_temperature_0_takes_the_likeliest_whatever_the_key():
  settings = dict(num_tokens=9, block_size=BLOCK, temperature=0.0)
  a, b = (
    generate(causal, prompts(3), jax.random.key(k), **settings) for k in (0, 1)
  )
  np.testing.assert_array_equal(a, b)
