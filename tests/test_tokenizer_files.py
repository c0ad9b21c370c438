"""Tokenizers to the files of Hugging Face and back."""

import copy
import functools
import json

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers as library

from nanomoe.data import tokenizer_files, tokenizers
from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.data.tokenizers import Bytes, Characters
from trainers.errors import UserError

any_text = settings(deadline=None, derandomize=True, database=None)

TEXTS = [
  '',
  ' ',
  '\n',
  'one\ntwo\n\n\nthree\r\nfour\r\r\n',
  '\ttab\t\ttabs \t ',
  '  leading and trailing   ',
  'runs  of   spaces      .',
  "it 's , n't ! what ? do not",  # Clean-up would drop these spaces.
  '👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈',
  'e\u0301e\u0308\u0323 é \u0301',
  '\0nul\0\0',
  '\u2028\u2029\x85\u00a0\u3000\ufeff\u200b',
  'Ċ Ġ ▁ <unknown> <unk> <s>',
  'the théâtre 漢字 \U0010ffff',
]
WHOLE = ''.join(TEXTS)
KINDS = ['Characters', 'Bytes', 'BPE']


@functools.cache
def fitted(kind):
  arguments = {'vocab_size': 300} if kind == 'BPE' else {}
  tokenizer = tokenizers.TOKENIZERS[kind](**arguments)
  tokenizer.fit({'train': WHOLE + 'the cat, the hat;\n' * 9, 'val': ''})
  return tokenizer


def read(state):
  """Returns the tokenizer of the library that reads a file."""
  return library.Tokenizer.from_str(json.dumps(state))


@functools.cache
def exported(kind):
  return read(tokenizer_files.to_json(fitted(kind)))


def again(state):
  """Returns the type and the tokenizer that a file gives."""
  config, vocabulary = tokenizer_files.from_json(state)
  tokenizer = tokenizers.build(config)
  tokenizer.load_state_dict(json.loads(json.dumps(vocabulary)))
  return config, tokenizer


def check(kind, text):
  ids = exported(kind).encode(text).ids
  assert ids == fitted(kind).encode(text).tolist()
  assert exported(kind).decode(ids) == text


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', [*TEXTS, WHOLE])
def test_the_library_has_the_same_tokens(kind, text):
  check(kind, text)


@any_text
@given(text=st.text(st.sampled_from(sorted(set(WHOLE)))))
def test_the_library_has_the_same_tokens_whatever_the_text(text):
  for kind in KINDS:
    check(kind, text)


@any_text
@given(text=st.text())
def test_bytes_hold_every_text(text):
  for kind in ('Bytes', 'BPE'):
    check(kind, text)


@any_text
@given(text=st.text(min_size=1))
def test_any_characters_can_be_the_vocabulary(text):
  tokenizer = Characters()
  tokenizer.fit({'train': text})
  state = tokenizer_files.to_json(tokenizer)
  ids = read(state).encode(text).ids
  assert ids == tokenizer.encode(text).tolist()
  assert read(state).decode(ids) == text
  assert again(state)[1].state_dict() == tokenizer.state_dict()


@pytest.mark.parametrize('kind', KINDS)
def test_any_tokens_decode_to_the_same_text(kind):
  """A sampled text may contain parts of a character."""
  rng = np.random.default_rng(0)
  for length in (1, 2, 9, 999):
    ids = rng.integers(fitted(kind).vocab_size, size=length).tolist()
    assert exported(kind).decode(ids) == fitted(kind).decode(ids)


@pytest.mark.parametrize('kind', KINDS)
def test_there_are_as_many_tokens(kind):
  assert exported(kind).get_vocab_size() == fitted(kind).vocab_size


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_gives_the_tokenizer_back(kind):
  ours = fitted(kind)
  config, tokenizer = again(tokenizer_files.to_json(ours))
  assert config['type'] == kind
  assert config.get('vocab_size', ours.vocab_size) == ours.vocab_size
  assert type(tokenizer) is type(ours)
  assert tokenizer.state_dict() == ours.state_dict()
  assert tokenizer.vocab_size == ours.vocab_size
  np.testing.assert_array_equal(tokenizer.encode(WHOLE), ours.encode(WHOLE))


@pytest.mark.parametrize('kind', KINDS)
def test_exporting_does_not_change_the_tokenizer(kind):
  before = copy.deepcopy(fitted(kind).state_dict())
  tokenizer_files.to_json(fitted(kind))
  assert fitted(kind).state_dict() == before


@pytest.mark.parametrize('stranger', ['Z', '\x01', '\x0b', '☃', '🦊', '\u0302'])
def test_an_unknown_character_is_an_error_of_the_library(stranger):
  assert stranger not in WHOLE
  with pytest.raises(Exception, match=r'(?i)unk'):
    exported('Characters').encode(f'the{stranger}cat')


class Shouting(Characters):
  """Characters with another encoding."""

  def encode(self, text):
    return super().encode(text.upper())


@pytest.mark.parametrize('kind', [Shouting, Tokenizer])
def test_no_other_class_is_exported(kind):
  with pytest.raises(UserError) as error:
    tokenizer_files.to_json(kind())
  (line,) = error.value.problems
  assert line.startswith('data.tokenizer.type=')
  assert kind.__name__ in line
  assert 'Characters, Bytes and BPE' in line


def from_file(state, tmp_path, text='the cat'):
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(state))
  tokenizer = BPE(file=str(path))
  tokenizer.fit({'train': text, 'val': ''})
  return tokenizer


def with_added(content):
  state = tokenizer_files.to_json(fitted('BPE'))
  tokenizer = read(state)
  tokenizer.add_special_tokens([content])
  tokenizer.post_processor = library.processors.TemplateProcessing(
    single=f'{content} $A', special_tokens=[(content, 300)]
  )
  return json.loads(tokenizer.to_str())


def test_the_tokens_of_a_text_are_all_that_the_library_returns(tmp_path):
  """A post-processor would begin each text with a special token."""
  state = with_added('<|end|>')
  text = 'the cat<|end|>\nthe hat'
  assert read(state).encode(text).ids[0] == 300
  ours = from_file(state, tmp_path)
  theirs = read(tokenizer_files.to_json(ours))
  ids = theirs.encode(text).ids
  assert ids == ours.encode(text).tolist()
  assert ids.count(300) == 1
  assert theirs.decode(ids, skip_special_tokens=False) == text
  for given_state in (state, tokenizer_files.to_json(ours)):
    config, tokenizer = again(given_state)
    assert config == {'type': 'BPE', 'vocab_size': 301}
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.token_bytes() == ours.token_bytes()


def test_an_added_token_that_decodes_to_other_text_is_refused(tmp_path):
  ours = from_file(with_added('né'), tmp_path)
  with pytest.raises(UserError, match=r"data\.tokenizer\.type='BPE'.*'né'"):
    tokenizer_files.to_json(ours)


def test_bytes_in_another_order_are_a_bpe():
  state = tokenizer_files.to_json(Bytes())
  vocabulary = state['model']['vocab']
  state['model']['vocab'] = {c: 255 - b for c, b in vocabulary.items()}
  config, tokenizer = again(state)
  assert config == {'type': 'BPE', 'vocab_size': 256}
  assert tokenizer.encode('a').tolist() == [255 - ord('a')]


@pytest.mark.parametrize('kind', KINDS)
def test_parts_that_do_not_change_tokens_are_not_compared(kind):
  tokenizer = read(tokenizer_files.to_json(fitted(kind)))
  tokenizer.decoder = library.decoders.WordPiece()
  tokenizer.enable_padding(length=99)
  tokenizer.enable_truncation(2)
  config, loaded = again(json.loads(tokenizer.to_str()))
  assert config['type'] == kind
  assert loaded.state_dict() == fitted(kind).state_dict()


def test_the_config_states_the_block_size():
  config = json.loads(json.dumps(tokenizer_files.tokenizer_config(64)))
  assert config['model_max_length'] == 64
  assert config['clean_up_tokenization_spaces'] is False
  assert config['add_prefix_space'] is False


def edited(kind, **changes):
  """Returns the value of a file with changed parts, by path."""
  state = copy.deepcopy(tokenizer_files.to_json(fitted(kind)))
  for path, value in changes.items():
    *parents, name = path.split('__')
    part = functools.reduce(lambda p, key: p[key], parents, state)
    part[name] = value
  return state


def sentencepiece():
  tokenizer = library.Tokenizer(
    library.models.BPE({'▁': 0, 'a': 1, '<0x00>': 2}, [], byte_fallback=True)
  )
  tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace()
  return json.loads(tokenizer.to_str())


def of_model(model):
  return json.loads(library.Tokenizer(model).to_str())


METASPACE = {
  'type': 'Metaspace',
  'replacement': '▁',
  'prepend_scheme': 'always',
  'split': True,
}
ADDED = {
  'id': 0,
  'content': 'the',
  'single_word': False,
  'lstrip': False,
  'rstrip': False,
  'normalized': False,
  'special': True,
}


@pytest.mark.parametrize(
  ('make', 'reason'),
  [
    (lambda: of_model(library.models.Unigram([('a', 0.0)], 0)), 'Unigram'),
    (lambda: of_model(library.models.WordPiece({'a': 0})), 'WordPiece'),
    (lambda: edited('Characters', model__vocab={}), 'empty'),
    (lambda: of_model(library.models.BPE({}, [])), 'ByteLevel'),
    (sentencepiece, 'byte_fallback'),
    (lambda: edited('BPE', pre_tokenizer=METASPACE), 'ByteLevel'),
    (lambda: edited('BPE', pre_tokenizer=None), 'ByteLevel'),
    (lambda: edited('BPE', model__end_of_word_suffix='x'), 'end_of_word'),
    (lambda: edited('Bytes', model__vocab={'▁': 0}), 'no byte'),
    (lambda: edited('Bytes', model__vocab={}), 'no tokens'),
    (lambda: edited('Bytes', model__vocab={'a': 2**30}), 'index'),
    (lambda: edited('BPE', model__merges=[['z', 'zzz']]), 'zzz'),
    (lambda: edited('Characters', model__vocab={'the': 0}), 'characters'),
    (lambda: edited('Characters', model__vocab={'': 0}), 'characters'),
    (lambda: edited('Characters', model__vocab={'b': 0, 'a': 1}), 'rank'),
    (lambda: edited('Characters', model__vocab={'a': 0, 'b': 2}), 'rank'),
    (lambda: edited('Characters', model__unk_token='a'), 'unknown'),
    (lambda: edited('Characters', pre_tokenizer=None), 'pre_tokenizer'),
    (lambda: edited('Characters', pre_tokenizer=METASPACE), 'pre_tokenizer'),
    (
      lambda: edited('Characters', normalizer={'type': 'Lowercase'}),
      'normalizer',
    ),
    (lambda: edited('Characters', added_tokens=[ADDED]), 'added_tokens'),
    (lambda: {}, None),
    (lambda: [], None),
    (lambda: None, None),
    (lambda: 'text', None),
    (lambda: 1.5, None),
    (lambda: {'model': []}, None),
    (lambda: {'model': {'type': 'BPE'}}, None),
    (lambda: edited('BPE', model__vocab=[]), None),
    (lambda: edited('BPE', model__vocab={'a': -1}), None),
    (lambda: edited('BPE', model__vocab={'a': 'b'}), None),
    (lambda: edited('BPE', model__merges=7), None),
    (lambda: edited('BPE', added_tokens={}), None),
    (lambda: edited('BPE', pre_tokenizer=[]), None),
    (lambda: edited('BPE', model__vocab={'\ud800': 0}), None),
    (lambda: functools.reduce(lambda a, _: [a], range(10**5), []), None),
  ],
)
def test_other_files_are_refused_with_a_reason(make, reason):
  with pytest.raises(ValueError, match=reason) as error:
    tokenizer_files.from_json(make())
  assert str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', KINDS)
def test_a_file_without_one_of_its_parts_is_read_or_refused(kind):
  """No other error is raised, whatever is missing or replaced."""
  state = tokenizer_files.to_json(fitted(kind))
  for parent in ((), ('model',), ('pre_tokenizer',)):
    for name in functools.reduce(lambda p, key: p[key], parent, state):
      for value in (..., None, [], {}, 'x', -1, True):
        damaged = copy.deepcopy(state)
        part = functools.reduce(lambda p, key: p[key], parent, damaged)
        del part[name]
        if value is not ...:
          part[name] = value
        try:
          again(damaged)
        except ValueError as error:
          assert str(error)
