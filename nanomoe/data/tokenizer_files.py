"""Conversion of tokenizers to and from the files of Hugging Face."""

import json
from typing import Any

import tokenizers as library

from nanomoe.data import bpe, tokenizer_json
from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.data.tokenizer_json import MAX_VOCAB_SIZE
from nanomoe.data.tokenizers import Bytes, Characters
from trainers.errors import UserError

# The library raises an error for an unknown character if the token for unknown
# characters is not in the vocabulary. Tokens of one character differ from it.
_UNKNOWN = '<unknown>'
# A dot matches no new line.
_ANY_CHARACTER = r'[\s\S]'
# Parts of a tokenizer.json that the tokens of a text do not depend on.
_UNUSED = ('version', 'decoder', 'post_processor', 'padding', 'truncation')
# Steps that may convert characters to bytes.
_STEPS = ('normalizer', 'pre_tokenizer')


def to_json(tokenizer: Tokenizer) -> dict[str, Any]:
  """Returns the value of a tokenizer.json with the same tokens.

  The `tokenizers` library encodes a text to the same tokens and decodes them to
  the same text. It raises an error for a character that `Characters` lacks.
  Decoding skips the special tokens of a BPE tokenizer from a file unless
  `skip_special_tokens` is False.

  Args:
    tokenizer: Tokenizer with a vocabulary, of class `Characters`, `Bytes` or
      `BPE`.

  Raises:
    UserError: `tokenizer` is of another class, or the library decodes an added
      token to another text.
  """
  kind = type(tokenizer)  # A subclass may encode in another way.
  if kind is Characters:
    return _characters(tokenizer.state_dict()['characters'])
  if kind is Bytes:
    return _bytes()
  if kind is BPE and isinstance(tokenizer, BPE):
    return _bpe(tokenizer)
  name = f'{kind.__module__}.{kind.__qualname__}'
  raise UserError(
    f'data.tokenizer.type={name!r}: no tokenizer.json has its tokens; '
    'Characters, Bytes and BPE are allowed'
  )


def tokenizer_config(model_max_length: int) -> dict[str, Any]:
  """Returns the value of the tokenizer_config.json beside a tokenizer.json.

  `AutoTokenizer` of transformers loads both files as a fast tokenizer. The
  tokenizer adds no tokens to a text and no spaces to it, and removes none.

  Args:
    model_max_length: Largest number of tokens in the context of the model.
  """
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_max_length': model_max_length,
    'clean_up_tokenization_spaces': False,
    'add_prefix_space': False,
  }


def from_json(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns the config and the vocabulary of a tokenizer.json.

  A file that `to_json` wrote gives the class it was written from. Any other
  byte-level BPE gives `BPE`, and the settings that `tokenizer_json.load` lists
  are disabled. The decoder and the post-processor are dropped, because NanoMoE
  uses neither.

  Args:
    state: JSON value of a tokenizer.json.

  Returns:
    The value of config.data.tokenizer, and the state that a tokenizer of this
    config loads with `load_state_dict`.

  Raises:
    ValueError: `state` is not a tokenizer, or is of an unsupported kind.
  """
  try:
    tokenizer = tokenizer_json.load(state)
  except RecursionError as error:
    raise ValueError('the JSON value is nested too deeply') from error
  # The library's own JSON has every setting under its current name.
  state = json.loads(tokenizer.to_str())
  kind = state['model']['type']
  if kind == 'WordLevel':
    vocabulary = {'characters': _characters_of(state)}
    Characters().load_state_dict(vocabulary)
    return {'type': 'Characters'}, vocabulary
  if kind != 'BPE':
    raise ValueError(
      f'model {kind} is not supported; a byte-level BPE or a WordLevel with '
      'one token for each character is needed'
    )
  if _used(state) == _used(_bytes()):
    return {'type': 'Bytes'}, {}
  size = _size_of_bpe(state, tokenizer)
  state |= {'decoder': None, 'post_processor': None}
  config = {'type': 'BPE', 'vocab_size': min(max(256, size), MAX_VOCAB_SIZE)}
  return config, {'tokenizer': state, 'cuts': bpe.CUTS}


def _characters(characters: str) -> dict[str, Any]:
  vocabulary = {c: i for i, c in enumerate(characters)}
  tokenizer = library.Tokenizer(
    library.models.WordLevel(vocabulary, unk_token=_UNKNOWN)
  )
  pattern = library.Regex(_ANY_CHARACTER)
  tokenizer.pre_tokenizer = library.pre_tokenizers.Split(pattern, 'isolated')
  # The default decoder joins tokens with spaces.
  tokenizer.decoder = library.decoders.Fuse()
  return json.loads(tokenizer.to_str())


def _bytes() -> dict[str, Any]:
  vocabulary = tokenizer_json.byte_of_character()
  tokenizer = library.Tokenizer(library.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  return json.loads(tokenizer.to_str())


def _bpe(tokenizer: BPE) -> dict[str, Any]:
  """Returns the JSON value of a BPE tokenizer.

  Raises:
    UserError: The library decodes an added token to another text.
  """
  state = tokenizer.state_dict()['tokenizer']
  # Post-processors add tokens to a text.
  state |= {'decoder': _bytes()['decoder'], 'post_processor': None}
  loaded = library.Tokenizer.from_str(json.dumps(state))
  for index, token in loaded.get_added_tokens_decoder().items():
    # The decoder takes the letters of an added token for bytes.
    decoded = loaded.decode([index], skip_special_tokens=False)
    if decoded != tokenizer.decode([index]):
      raise UserError(
        f"data.tokenizer.type='BPE': the added token {token.content!r} would "
        f'decode to {decoded!r}; added tokens of ASCII characters are allowed'
      )
  return state


def _used(state: dict[str, Any]) -> dict[str, Any]:
  """Returns the parts of a tokenizer.json that decide the tokens of a text."""
  return {key: state[key] for key in state.keys() - _UNUSED}


def _characters_of(state: dict[str, Any]) -> str:
  """Returns the vocabulary of a tokenizer.json that `Characters` can replace.

  Raises:
    ValueError: The tokens of a text may differ from those of `Characters`.
  """
  vocabulary = state['model']['vocab']
  if any(len(token) != 1 for token in vocabulary):
    raise ValueError(
      'WordLevel is not supported with tokens of many characters'
    )
  characters = ''.join(sorted(vocabulary))
  expected = _characters(characters)
  if vocabulary != expected['model']['vocab']:
    raise ValueError(
      'WordLevel is not supported unless the indices of the tokens are the '
      'ranks of the characters'
    )
  if state['model']['unk_token'] in vocabulary:
    raise ValueError('WordLevel is not supported with a token for the unknown')
  expected['model']['unk_token'] = state['model']['unk_token']
  for key in _used(state).keys() | _used(expected).keys():
    if state.get(key) != expected.get(key):
      shown = json.dumps(state.get(key), ensure_ascii=False)
      raise ValueError(
        f'WordLevel is not supported with {key}={shown}; '
        f'{json.dumps(expected.get(key))} is'
      )
  return characters


def _size_of_bpe(state: dict[str, Any], tokenizer: library.Tokenizer) -> int:
  """Returns the number of tokens of a byte-level BPE.

  Raises:
    ValueError: The tokens of the BPE are not bytes.
  """
  for key in (
    'byte_fallback',
    'continuing_subword_prefix',
    'end_of_word_suffix',
  ):
    if value := state['model'].get(key):
      raise ValueError(f'BPE with {key}={value!r} is not supported')
  if not any('ByteLevel' in _types(state[key]) for key in _STEPS):
    raise ValueError('the BPE is not byte-level: it has no step ByteLevel')
  size = len(tokenizer_json.bytes_of_tokens(tokenizer))
  if not size:
    raise ValueError('the vocabulary has no tokens')
  return size


def _types(step: dict[str, Any] | None) -> set[str]:
  """Returns the types of a normalizer or pre-tokenizer and of its parts."""
  found, nested = set(), [step]
  while nested:
    if part := nested.pop():
      found.add(part['type'])
      for key in ('normalizers', 'pretokenizers'):
        nested += part.get(key, [])
  return found
