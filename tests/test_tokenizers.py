"""Text to integers and back."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers as library

from nanomoe.data import tokenizers
from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizers import Bytes, Characters
from trainers.errors import UserError

any_text = settings(deadline=None, derandomize=True, database=None)


def fitted(tokenizer, text):
  tokenizer.fit({'train': text, 'val': ''})
  return tokenizer


@pytest.fixture(scope='module')
def bpe():
  return fitted(BPE(300), 'the cat, the hat;\n\nthe bat: théâtre ' * 20)


@any_text
@given(st.text())
def test_text_comes_back(text):
  tokenizer = fitted(Characters(), text)
  tokens = tokenizer.encode(text)
  assert tokens.dtype == np.int32
  assert tokens.shape == (len(text),)
  assert tokenizer.decode(tokens) == text


@any_text
@given(st.text(), st.randoms())
def test_the_vocabulary_is_sorted_whatever_the_order(text, random):
  shuffled = list(text)
  random.shuffle(shuffled)
  tokenizer = fitted(Characters(), ''.join(shuffled))
  assert list(tokenizer.characters) == sorted(set(text))
  assert tokenizer.vocab_size == len(set(text))
  assert set(tokenizer.encode(text)) == set(range(tokenizer.vocab_size))


def test_tokens_are_ranks_of_code_points():
  text = 'b\na😀éb'  # \n < a < b < é < 😀
  tokenizer = fitted(Characters(), text)
  assert tokenizer.encode(text).tolist() == [2, 0, 1, 4, 3, 2]
  assert tokenizer.decode([4, 0]) == '😀\n'


def test_characters_of_both_splits_have_tokens():
  tokenizer = Characters()
  tokenizer.fit({'train': 'ab', 'val': 'bc'})
  assert tokenizer.characters == 'abc'


@pytest.mark.parametrize('stranger', ['a', '!', 'm', 'é', '😀', '\n'])
def test_a_character_without_a_token_is_named_with_its_position(stranger):
  """Below, between and above those that have one."""
  text = 'xyz' * 1234 + stranger + 'x' + stranger
  with pytest.raises(UserError) as error:
    fitted(Characters(), 'bxyz').encode(text)
  (line,) = error.value.problems
  assert repr(stranger) in line
  assert '3702' in line  # 3 * 1234


def test_no_vocabulary_has_no_token():
  with pytest.raises(UserError, match="'a'"):
    fitted(Characters(), '').encode('a')


@pytest.mark.parametrize('name', tokenizers.TOKENIZERS)
def test_the_stored_vocabulary_makes_the_same_tokens(name):
  text = 'to be, "or" not\n★'
  tokenizer = fitted(tokenizers.TOKENIZERS[name](), text)
  state = json.loads(json.dumps(tokenizer.state_dict()))
  again = tokenizers.TOKENIZERS[name]()
  again.load_state_dict(state)
  np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
  assert again.token_bytes() == tokenizer.token_bytes()
  assert again.vocab_size == tokenizer.vocab_size


@any_text
@given(text=st.text())
def test_bytes_and_their_pairs_hold_any_text(bpe, text):
  """Tokens join to the text's UTF-8; so nothing is lost, whatever it is."""
  for tokenizer in (Bytes(), bpe):
    tokens = tokenizer.encode(text)
    utf8 = tokenizer.token_bytes()
    assert b''.join(utf8[t] for t in tokens) == text.encode()
    assert tokenizer.decode(tokens) == text


def test_pairs_are_learned_and_decoded_as_the_library_does(bpe):
  text = 'the hat; théâtre'
  tokens = bpe.encode(text)
  assert 256 < bpe.vocab_size <= 300
  assert len(tokens) < len(text) / 2
  theirs = library.Tokenizer.from_str(json.dumps(bpe.state_dict()['tokenizer']))
  theirs.decoder = library.decoders.ByteLevel()
  assert theirs.encode(text).ids == tokens.tolist()
  assert theirs.decode(tokens.tolist()) == bpe.decode(tokens)
  # A part of a character, alone, is shown as missing.
  assert '\ufffd' in bpe.decode(bpe.encode('漢')[:1])


def test_only_the_training_split_is_learned_from():
  tokenizer = BPE(257)
  tokenizer.fit({'train': 'ab' * 9, 'val': 'cd' * 99})
  assert tokenizer.token_bytes()[256] == b'ab'


def test_a_tokenizer_json_is_used_as_it_is(bpe, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(bpe.state_dict()['tokenizer']))
  other = fitted(BPE(file=str(path)), 'another text')
  assert other.encode('the cat').tolist() == bpe.encode('the cat').tolist()


def _words(path):
  words = library.Tokenizer(library.models.WordLevel({'the': 0, 'é': 1}, 'the'))
  words.pre_tokenizer = library.pre_tokenizers.Whitespace()
  words.save(str(path))


@pytest.mark.parametrize(
  ('make', 'reason'),
  [
    (lambda path: None, 'No such file'),
    (lambda path: path.write_text('{"version": 1}'), 'byte-level'),
    (lambda path: path.write_text('not JSON'), 'byte-level'),
    (lambda path: path.write_bytes(b'\xff\xfe'), 'byte-level'),
    (lambda path: path.mkdir(), 'directory'),
    (_words, 'character'),
  ],
)
def test_what_is_no_tokenizer_json_is_told(make, reason, tmp_path):
  path = tmp_path / 'tokenizer.json'
  make(path)
  with pytest.raises(UserError, match=reason) as error:
    fitted(BPE(file=str(path)), 'the text')
  assert 'data.tokenizer.file' in error.value.problems[0]


def test_a_vocabulary_below_the_bytes_is_refused():
  with pytest.raises(UserError, match='vocab_size=255 must be >= 256'):
    tokenizers.build({'type': 'BPE', 'vocab_size': 255})
  with pytest.raises(UserError, match=r'is not a .*Tokenizer'):
    tokenizers.build({'type': 'collections.Counter'})


@pytest.mark.parametrize(
  'state', [{}, {'characters': 'ba'}, {'characters': 'aa'}, {'characters': 5}]
)
def test_a_damaged_vocabulary_is_told(state, tmp_path):
  path = tmp_path / 'vocabulary.json'
  path.write_text(
    json.dumps({'corpus': 'x', 'corpus_sha256': 'y', **state}), encoding='utf-8'
  )
  with pytest.raises(UserError, match=r'vocabulary\.json: .*damaged'):
    tokenizers.load({'type': 'Characters'}, path)
