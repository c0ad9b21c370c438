"""Text to integers and back."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from nanomoe.data.tokenizers import Characters
from trainers.errors import UserError


@settings(deadline=None, derandomize=True, database=None)
@given(st.text())
def test_text_comes_back(text):
  tokenizer = Characters.of(text)
  tokens = tokenizer.encode(text)
  assert tokens.dtype == np.int32
  assert tokens.shape == (len(text),)
  assert tokenizer.decode(tokens) == text


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(), st.randoms())
def test_the_vocabulary_is_sorted_whatever_the_order(text, random):
  shuffled = list(text)
  random.shuffle(shuffled)
  tokenizer = Characters.of(''.join(shuffled))
  assert list(tokenizer.characters) == sorted(set(text))
  assert tokenizer.vocab_size == len(set(text))
  assert set(tokenizer.encode(text)) == set(range(tokenizer.vocab_size))


def test_tokens_are_ranks_of_code_points():
  text = 'b\na😀éb'  # \n < a < b < é < 😀
  tokenizer = Characters.of(text)
  assert tokenizer.encode(text).tolist() == [2, 0, 1, 4, 3, 2]
  assert tokenizer.decode([4, 0]) == '😀\n'


@pytest.mark.parametrize('stranger', ['a', '!', 'm', 'é', '😀', '\n'])
def test_a_character_without_a_token_is_named_with_its_position(stranger):
  """Below, between and above those that have one."""
  text = 'xyz' * 1234 + stranger + 'x' + stranger
  with pytest.raises(UserError) as error:
    Characters.of('bxyz').encode(text)
  (line,) = error.value.problems
  assert repr(stranger) in line
  assert '3702' in line  # 3 * 1234


def test_no_vocabulary_has_no_token():
  with pytest.raises(UserError, match="'a'"):
    Characters.of('').encode('a')


def test_the_stored_vocabulary_makes_the_same_tokens():
  text = 'to be, "or" not\n★'
  tokenizer = Characters.of(text)
  stored = json.loads(json.dumps(tokenizer.state_dict()))
  again = Characters(stored['characters'])
  np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
