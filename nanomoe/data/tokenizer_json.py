"""Reader of tokenizer.json files, without settings that change texts."""

from collections.abc import Iterable, Iterator
import json
import logging
from typing import Any

import tokenizers as library

log = logging.getLogger(__name__)

# The library aborts the process if there is no memory for more tokens.
MAX_VOCAB_SIZE = 2**22

# Settings that drop, add or randomly vary tokens, with their neutral values.
_NEUTRAL = {
  'padding': None,
  'truncation': None,
  'dropout': None,
  'add_prefix_space': False,
  'lstrip': False,
  'rstrip': False,
  'strip_left': False,
  'strip_right': False,
}


def load(state: Any) -> library.Tokenizer:
  """Returns the tokenizer that the JSON value `state` describes.

  Padding, truncation, BPE dropout, prefix spaces and stripped spaces are
  disabled, because they change the text of the tokens. Added tokens whose index
  also stands for other bytes are disabled for the same reason. One log line
  names the disabled settings.

  Raises:
    ValueError: `state` is not a tokenizer.
  """
  tokenizer = _from_json(json.dumps(state))
  # The library writes its JSON index by index, up to the largest one.
  _check_indices(tokenizer.get_vocab().values())
  # The library's own JSON has every setting under its current name.
  state = json.loads(tokenizer.to_str())
  disabled = []
  for settings in _settings(state):
    for name in settings.keys() & _NEUTRAL.keys():
      if settings[name]:
        shown = json.dumps(settings[name], ensure_ascii=False)
        disabled.append(f'{name}={shown}')
        settings[name] = _NEUTRAL[name]
  for token in _ambiguous(state):
    shown = json.dumps(token['content'], ensure_ascii=False)
    disabled.append(f'added token {shown}')
    state['added_tokens'].remove(token)
  if disabled:
    log.info(
      'disabled tokenizer settings that change the text: %s',
      ', '.join(sorted(set(disabled))),
    )
    tokenizer = _from_json(json.dumps(state))
  return tokenizer


def bytes_of_tokens(tokenizer: library.Tokenizer) -> list[bytes]:
  """Returns the bytes of each token; an index without a token gets no bytes.

  Each character of a learned token stands for a byte. An added token is text,
  which the library finds before it converts the rest to bytes.

  Raises:
    ValueError: A character of a learned token stands for no byte, or an index
      is above `MAX_VOCAB_SIZE`.
  """
  byte_of = byte_of_character()
  added = {
    index: token.content
    for index, token in tokenizer.get_added_tokens_decoder().items()
  }
  learned = {
    index: token
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items()
    if index not in added
  }
  last = _check_indices({*added, *learned})
  invalid = sorted(set().union(*learned.values()) - set(byte_of))
  if invalid:
    raise ValueError(f'character {invalid[0]!r} of a token stands for no byte')
  table = [b''] * (last + 1)
  for index, token in learned.items():
    table[index] = bytes(byte_of[c] for c in token)
  for index, content in added.items():
    table[index] = content.encode()
  return table


def _check_indices(indices: Iterable[int]) -> int:
  """Returns the largest index, or -1; a table up to it must fit in memory.

  Raises:
    ValueError: An index is above `MAX_VOCAB_SIZE`.
  """
  last = max(indices, default=-1)
  if last > MAX_VOCAB_SIZE:
    raise ValueError(f'a token has index {last}, above {MAX_VOCAB_SIZE}')
  return last


def _from_json(text: str) -> library.Tokenizer:
  try:
    return library.Tokenizer.from_str(text)
  except Exception as error:  # The library raises no more specific class.
    raise ValueError(str(error)) from error


def _settings(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields each object of `state` that may hold a setting of `_NEUTRAL`."""
  yield state
  yield state['model']
  yield from state['added_tokens']
  # A Sequence contains other objects. The post-processor and the decoder are
  # not searched, because nothing uses them.
  nested = [state['normalizer'], state['pre_tokenizer']]
  while nested:
    if settings := nested.pop():
      yield settings
      for parts in ('normalizers', 'pretokenizers'):
        nested += settings.get(parts, [])


def _ambiguous(state: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the added tokens whose index also stands for other bytes.

  An added token that is in the vocabulary shares the index of that entry. 'Ċ',
  for example, is a letter in a text and a new line in the vocabulary.
  """
  byte_of = byte_of_character()
  merged = {
    merge.replace(' ', '') if isinstance(merge, str) else ''.join(merge)
    for merge in state['model'].get('merges', [])
  }
  return [
    token
    for token in state['added_tokens']
    if (len(token['content']) == 1 or token['content'] in merged)
    and token['content'] in state['model']['vocab']
    and set(token['content']) <= byte_of.keys()
    and bytes(byte_of[c] for c in token['content']) != token['content'].encode()
  ]


def byte_of_character() -> dict[str, int]:
  """Returns the byte of each character of a byte-level vocabulary.

  A printable character stands for the byte of its code point. The remaining
  characters stand for the other bytes, in order.
  """
  alphabet = set(library.pre_tokenizers.ByteLevel.alphabet())
  printable = {chr(b): b for b in range(256) if chr(b) in alphabet}
  others = [b for b in range(256) if chr(b) not in alphabet]
  rest = sorted(alphabet - set(printable))
  return printable | dict(zip(rest, others, strict=True))
