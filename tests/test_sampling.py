"""Sampling: the draw, the window, the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.sampling import Generator, Sampling, draw
from tests.routed import QUICKLY
from tests.shrunk import MODERN, TINY
from trainers.errors import UserError

pytestmark = pytest.mark.optimized

VOCAB = 11
BLOCK = 6
GREEDY = Sampling(temperature=0.0)


def _model(choices):
  """Returns logits and weights of a model whose window is 6 tokens."""
  changes = {**TINY, **choices, 'block_size': BLOCK, 'precision': 'float32'}
  config = config_lib.apply(
    base.get_config(), [(k, str(v)) for k, v in changes.items()]
  )
  task = experiment.build_task(experiment.resolve_auto(config), VOCAB)
  batch = {'inputs': jnp.zeros((1, BLOCK), jnp.int32)}
  params, state = jax.jit(task.init)(jax.random.key(0), batch)
  return task.logits, (jax.tree.map(lambda x: 3 * x, params), state)


@pytest.fixture(scope='module')
def model():
  return _model({'model.num_layers': 1})


def _generate(model, prompts, num_tokens, sampling, seed=0, cached=True):
  generator = Generator(*model, BLOCK, cached=cached)
  return np.stack(list(generator(prompts, num_tokens, sampling, seed)), axis=1)


def _by_definition(model, prompt, num_tokens, sampling, seed):
  """Generates for one sequence, without padding or cache.

  The window grows, and restarts with its second half.
  """
  logits, trained = QUICKLY(model[0]), model[1]
  window, text = list(prompt[-BLOCK:]), []
  for i in range(num_tokens):
    key = jax.random.fold_in(jax.random.key(seed), i)
    every, _ = logits(trained, jnp.asarray([window], jnp.int32))
    token = int(draw(every[:, -1], key, sampling)[0])
    text.append(token)
    if len(window) == BLOCK:
      window = window[BLOCK - BLOCK // 2 :]
    window.append(token)
  return text


PROMPTS = [[3], [1, 2, 3, 4, 5], list(range(11)), [7, 7]]


@pytest.mark.slow
@pytest.mark.parametrize(
  'choices',
  [
    MODERN,
    *(
      pytest.param({key: MODERN[key]}, id=key)
      # Those that the cache knows.
      for key in (
        *('model.position', 'model.conv_width', 'model.max_ngram'),
        'model.num_kv_heads',
      )
    ),
  ],
)
def test_every_choice_is_cached_as_it_is_defined(choices):
  """Each prompt is at another position of its window."""
  model = _model(choices)
  cached = _generate(model, PROMPTS, 16, GREEDY)
  uncached = _generate(model, PROMPTS, 16, GREEDY, cached=False)
  np.testing.assert_array_equal(cached, uncached)
  assert len(np.unique(cached)) > 2


@pytest.mark.parametrize(
  'sampling',
  [GREEDY, pytest.param(Sampling(1.0, 5, 0.9), marks=pytest.mark.slow)],
)
def test_cached_uncached_and_definition_agree(model, sampling):
  """Equal tokens, over three restarts, for prompts of several lengths."""
  cached = _generate(model, PROMPTS, 16, sampling)
  uncached = _generate(model, PROMPTS, 16, sampling, cached=False)
  np.testing.assert_array_equal(cached, uncached)
  assert len(np.unique(cached)) > 2  # The texts are no constants.
  alone = _generate(model, PROMPTS[2:3], 16, sampling, seed=5)
  np.testing.assert_array_equal(
    alone[0], _by_definition(model, PROMPTS[2], 16, sampling, 5)
  )


@pytest.mark.slow
def test_greedy_depends_on_no_other_prompt_and_no_seed(model):
  together = _generate(model, PROMPTS, 10, GREEDY, seed=1)
  for i, prompt in enumerate(PROMPTS):
    alone = _generate(model, [prompt], 10, GREEDY, seed=2)
    np.testing.assert_array_equal(alone[0], together[i])


def test_two_compilations_whatever_the_lengths(model):
  generator = Generator(*model, BLOCK)
  for prompt, num_tokens, sampling in [
    ([1], 3, GREEDY),
    ([1, 2, 3, 4], 9, Sampling(0.7)),
    (list(range(9)), 20, Sampling(1.0, 3, 0.5)),
  ]:
    list(generator([prompt], num_tokens, sampling, 0))
  assert generator._read._cache_size() == 1
  assert generator._add._cache_size() == 1


def _frequencies(logits, sampling, num=4000):
  # An offset of a row changes no distribution.
  offset = (jnp.arange(num) % 7)[:, None]
  rows = jnp.asarray(logits, jnp.float32) + offset
  tokens = jax.jit(draw)(rows, jax.random.key(0), sampling)
  return np.bincount(tokens, minlength=len(logits)) / num


LOGITS = np.log([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
  ('sampling', 'expected'),
  [
    (Sampling(1.0), [0.4, 0.3, 0.2, 0.1]),
    # Squared and normalised: 16 : 9 : 4 : 1.
    (Sampling(0.5), np.array([16, 9, 4, 1]) / 30),
    (Sampling(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
    (Sampling(1.0, top_k=1), [1, 0, 0, 0]),
    (Sampling(1.0, top_k=99), [0.4, 0.3, 0.2, 0.1]),
    # 0.4 + 0.3 reach 0.65; 0.4 alone does not.
    (Sampling(1.0, top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
    (Sampling(1.0, top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (Sampling(1.0, top_p=0.0), [1, 0, 0, 0]),
    # Of the two likeliest, 4 / 7 is more than 0.5.
    (Sampling(1.0, top_k=2, top_p=0.5), [1, 0, 0, 0]),
    # After the temperature: two of 16 : 9 : 4 : 1 reach 0.8, not 0.4 + 0.3.
    (Sampling(0.5, top_p=0.8), [16 / 25, 9 / 25, 0, 0]),
    (Sampling(0.0), [1, 0, 0, 0]),
  ],
)
def test_draws_have_the_distribution(sampling, expected):
  expected = np.asarray(expected)
  deviation = np.sqrt(expected * (1 - expected) / 4000)
  found = _frequencies(LOGITS, sampling)
  assert (np.abs(found - expected) <= 4 * deviation).all(), found


@pytest.mark.slow
def test_padding_of_the_vocabulary_is_never_drawn():
  """The model has logits of the padding, and the loss includes them."""
  logits, (params, state) = _model({'model.vocab_rows': 300})
  assert params['token_embedding'].shape[0] == 300
  model = logits, (params, state)
  assert QUICKLY(logits)(model[1], jnp.zeros((1, 2), jnp.int32))[0].shape == (
    *(1, 2),
    VOCAB,
  )
  # Nearly uniform: most of 300 rows are padding.
  tokens = _generate(model, PROMPTS, 20, Sampling(temperature=1e3))
  assert tokens.max() < VOCAB


def test_a_vocabulary_needs_a_row_for_each_token():
  with pytest.raises(UserError, match=r'model\.vocab_rows=10: .*at least 11'):
    _model({'model.vocab_rows': VOCAB - 1})
