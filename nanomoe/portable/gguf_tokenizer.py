"""Tokenizers of GGUF files, which llama.cpp implements.

Its tokenizer `gpt2` merges the bytes of each word. Its tokenizer `rwkv` takes
the longest token at each place, so it suits tokens of one byte. It has no token
that ends a text.
"""

import json
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import gguf
import tokenizers as library

from nanomoe.data import merges as merges_lib
from nanomoe.data import tokenizer_files, tokenizer_json
from nanomoe.data.bpe import BPE
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.portable import verify
from trainers.errors import UserError

# Bytes that no UTF-8 text has. The tokenizer `gpt2` always has a token that
# ends a text, and no model learns to draw these.
_ENDS = (*range(0xFF, 0xF4, -1), 0xC0, 0xC1)
_KEYS = gguf.Keys.Tokenizer
# Settings of a BPE that llama.cpp does not have.
_UNSET = (
  *('ignore_merges', 'byte_fallback'),
  *('continuing_subword_prefix', 'end_of_word_suffix'),
)


class Vocabulary(NamedTuple):
  """Tokenizer of a GGUF file.

  Attributes:
    model: Name of the algorithm, 'gpt2' or 'rwkv'.
    tokens: Text of each token, in the notation of the algorithm.
    merges: Pairs of tokens that are merged, the first ones first.
    end: Index of the token that ends a text; None without one.
  """

  model: str
  tokens: list[str]
  merges: list[str]
  end: int | None


def problems(tokenizer: Tokenizer) -> list[str]:
  """Returns a line for each property of a tokenizer that llama.cpp lacks.

  Args:
    tokenizer: Tokenizer of class `Characters`, `Bytes` or `BPE`.
  """
  kind = type(tokenizer).__name__
  where = f'data.tokenizer.type={kind!r}'
  if not isinstance(tokenizer, BPE):
    # The search for a character that shares only its first bytes with a token
    # never ends in llama.cpp.
    long = [t.decode() for t in tokenizer.token_bytes() if len(t) > 1]
    return [
      f'{where}: the character {text!r} is not ASCII, and llama.cpp hangs at '
      "similar characters; Characters of ASCII, 'Bytes' and 'BPE' are allowed"
      for text in long[:1]
    ]
  lines, state = [], tokenizer_files.to_json(tokenizer)
  model, table = state['model'], tokenizer.token_bytes()
  if added := [token['content'] for token in state['added_tokens']]:
    lines.append(
      f'{where}: llama.cpp treats the added token {added[0]!r} in another way; '
      'no added token is allowed'
    )
  elif marks := [t for t in model['vocab'] if re.search(r'[<\[].*[a-zA-Z]', t)]:
    lines.append(
      f'{where}: llama.cpp may end a text at the token {marks[0]!r}; no token '
      'with a bracket and letters is allowed'
    )
  if state['normalizer']:
    lines.append(
      f'{where}: llama.cpp lacks the normalizer {state["normalizer"]["type"]}; '
      'no normalizer is allowed'
    )
  if state['pre_tokenizer'] not in _known_pre_tokenizers():
    lines.append(
      f'{where}: llama.cpp lacks the pre-tokenizer of the file; that of GPT-2 '
      'is allowed'
    )
  lines += [
    f'{where}: llama.cpp lacks {name}={model[name]!r}; it must be unset'
    for name in _UNSET
    if model.get(name)
  ]
  if not all(table):
    lines.append(
      f'{where}: no token has index {table.index(b"")}; each index below '
      f'{len(table)} must have a token'
    )
  if not model['merges'] and any(len(token) > 1 for token in table):
    lines.append(
      f'{where}: llama.cpp needs merges; the file must have the merges of its '
      'tokens'
    )
  if model['merges'] and _end(table) is None:
    lines.append(
      f'{where}: llama.cpp needs a token that ends a text; the vocabulary must '
      'have the byte 0xFF, which no text has'
    )
  return lines


def _known_pre_tokenizers() -> list[dict[str, Any]]:
  """Returns the JSON values of the split of GPT-2 and of a learned BPE."""
  pre = library.pre_tokenizers  # pyright: ignore
  found = []
  for splitter in (
    merges_lib.pre_tokenizer(),
    *(
      pre.ByteLevel(add_prefix_space=False, trim_offsets=t)
      for t in (False, True)
    ),
  ):
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = splitter
    found.append(json.loads(tokenizer.to_str())['pre_tokenizer'])
  return found


def _end(table: list[bytes]) -> int | None:
  """Returns the index of a token that is in no text, or None."""
  ends = (bytes([byte]) for byte in _ENDS)
  return next((table.index(end) for end in ends if end in table), None)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
  """Returns the tokenizer of a GGUF file.

  Args:
    tokenizer: Tokenizer for which `problems` is empty.
  """
  table = tokenizer.token_bytes()
  if all(len(token) == 1 for token in table):
    return Vocabulary('rwkv', [_escaped(token) for token in table], [], None)
  model = tokenizer_files.to_json(tokenizer)['model']
  tokens = sorted(model['vocab'], key=model['vocab'].__getitem__)
  pairs = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
  return Vocabulary('gpt2', tokens, pairs, _end(table))


def _escaped(token: bytes) -> str:
  """Returns a token of one byte in the notation of `rwkv`."""
  text = chr(token[0])
  is_plain = text.isascii() and text.isprintable() and text != '\\'
  return text if is_plain else f'\\x{token[0]:02x}'


def _unescaped(text: str) -> int:
  """Returns the byte of a token of `rwkv`."""
  return ord(text) if len(text) == 1 else int(text.removeprefix('\\x'), 16)


def fields(vocabulary: Vocabulary) -> dict[str, Any]:
  """Returns the metadata of a GGUF file, by key."""
  found = {
    _KEYS.MODEL: vocabulary.model,
    _KEYS.LIST: vocabulary.tokens,
    _KEYS.TOKEN_TYPE: [int(gguf.TokenType.NORMAL)] * len(vocabulary.tokens),
    # The model has seen no such token.
    _KEYS.ADD_BOS: False,
    _KEYS.ADD_EOS: False,
  }
  if vocabulary.model == 'gpt2':
    found[_KEYS.PRE] = 'gpt-2'
    found[_KEYS.MERGES] = vocabulary.merges
  if vocabulary.end is not None:  # The default is token 11.
    found |= {_KEYS.BOS_ID: vocabulary.end, _KEYS.EOS_ID: vocabulary.end}
  return found


def same_tokens(
  found: dict[str, Any], tokenizer: Tokenizer, text: str | LargeText
) -> int:
  """Compares the token ids of a text with those of a GGUF file.

  Args:
    found: Metadata in the file, by key.
    tokenizer: Tokenizer of the run.
    text: Text to tokenize.

  Returns:
    The number of tokens.

  Raises:
    UserError: Token ids differ, or the ids do not decode to the text.
  """
  with tempfile.TemporaryDirectory() as name:
    path = pathlib.Path(name) / 'tokenizer.json'
    path.write_text(_to_json(found), encoding='utf-8')
    try:
      return verify.same_tokens(path.parent, tokenizer, text)
    except UserError as error:
      message = str(error).replace(path.name, 'the file for llama.cpp')
      raise UserError(
        f'{message}. A learned BPE splits words after {merges_lib.MAX_WORD} '
        'characters, and llama.cpp does not'
      ) from error


def _to_json(found: dict[str, Any]) -> str:
  """Returns a tokenizer.json with the tokens of a GGUF file."""
  texts, is_gpt2 = found[_KEYS.LIST], found[_KEYS.MODEL] == 'gpt2'
  if not is_gpt2:
    character = {b: c for c, b in tokenizer_json.byte_of_character().items()}
    texts = [character[_unescaped(text)] for text in texts]
  pairs = [tuple(merge.split(' ')) for merge in found.get(_KEYS.MERGES, [])]
  ids = {text: i for i, text in enumerate(texts)}
  tokenizer = library.Tokenizer(library.models.BPE(ids, pairs))
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=is_gpt2
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  return tokenizer.to_str()
