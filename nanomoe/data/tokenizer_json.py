"""Reading a tokenizer.json: settings that change texts, bytes of tokens."""

from collections.abc import Iterator
import json
import logging
from typing import Any

import tokenizers as library

log = logging.getLogger(__name__)

# The library aborts the process if it finds no memory for more tokens.
MAX_VOCAB_SIZE = 2**22

# Each setting loses, adds or randomly varies tokens, and its neutral value.
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
  disabled, and so are added tokens whose index means other bytes: with them,
  tokens are not those of the text. One log line names what was disabled.

  Raises:
    ValueError: `state` is not a tokenizer.
  """
  tokenizer = _from_json(json.dumps(state))
  state = json.loads(tokenizer.to_str())  # As the library writes it.
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
      'disabled in the tokenizer, because tokens must be those of the text: %s',
      ', '.join(sorted(set(disabled))),
    )
    tokenizer = _from_json(json.dumps(state))
  return tokenizer


def bytes_of_tokens(tokenizer: library.Tokenizer) -> list[bytes]:
  """Returns the bytes of each token; an index without a token has none.

  Characters of a learned token stand for bytes. An added token is text, which
  the library looks for before it makes bytes of anything.

  Raises:
    ValueError: a learned token has a character that stands for no byte, or an
      index is above MAX_VOCAB_SIZE.
  """
  byte_of = _byte_of_character()
  added = {
    index: token.content
    for index, token in tokenizer.get_added_tokens_decoder().items()
  }
  learned = {
    index: token
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items()
    if index not in added
  }
  # Checked first: a table up to a far index fills the memory.
  last = max({*added, *learned}, default=-1)
  if last > MAX_VOCAB_SIZE:
    raise ValueError(f'it has a token beyond {MAX_VOCAB_SIZE}')
  strangers = sorted(set().union(*learned.values()) - set(byte_of))
  if strangers:
    raise ValueError(f'its tokens hold {strangers[0]!r}, which is no byte')
  table = [b''] * (last + 1)
  for index, token in learned.items():
    table[index] = bytes(byte_of[c] for c in token)
  for index, content in added.items():
    table[index] = content.encode()
  return table


def _from_json(text: str) -> library.Tokenizer:
  try:
    return library.Tokenizer.from_str(text)
  except Exception as error:  # The library raises nothing more exact.
    raise ValueError(str(error)) from error


def _settings(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """Yields each object of `state` that may hold a setting of `_NEUTRAL`."""
  yield state
  yield state['model']
  yield from state['added_tokens']
  # A Sequence holds others. Neither post-processor nor decoder is ever used.
  nested = [state['normalizer'], state['pre_tokenizer']]
  while nested:
    if settings := nested.pop():
      yield settings
      for parts in ('normalizers', 'pretokenizers'):
        nested += settings.get(parts, [])


def _ambiguous(state: dict[str, Any]) -> list[dict[str, Any]]:
  """Returns the added tokens whose index is also that of other bytes.

  An added token that is in the vocabulary has its index. 'Ċ', for example, is
  a letter in a text, and a new line in the vocabulary.
  """
  byte_of = _byte_of_character()
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


def _byte_of_character() -> dict[str, int]:
  """Returns the byte that each character of a byte-level vocabulary is.

  Printable characters are their own bytes; the other bytes, in order, are the
  remaining characters.
  """
  alphabet = set(library.pre_tokenizers.ByteLevel.alphabet())
  own = {chr(b): b for b in range(256) if chr(b) in alphabet}
  others = [b for b in range(256) if chr(b) not in alphabet]
  return own | dict(zip(sorted(alphabet - set(own)), others, strict=True))
