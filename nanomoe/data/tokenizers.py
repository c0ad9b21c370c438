"""Tokenizers of characters and bytes, and the table of all tokenizers."""

from collections.abc import Mapping, Sequence
import json
import pathlib
import sys
from typing import Any

from jaxtyping import Int, UInt32
import numpy as np

from nanomoe.config import validation
from nanomoe.data import large_text
from nanomoe.data.bpe import BPE
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from trainers import spec
from trainers.errors import UserError

CHUNK_CHARS = 1 << 16  # Characters of a text in temporary arrays.


class Characters(Tokenizer):
  """Tokenizer with a token per distinct character, in code point order."""

  fits_pieces = True

  def __init__(self):
    self.characters = ''

  def fit(self, texts: Mapping[str, str | LargeText]) -> None:
    is_there = np.zeros(sys.maxunicode + 1, bool)
    for text in texts.values():
      for chunk in large_text.chunks(text, CHUNK_CHARS):
        is_there[_code_points(chunk)] = True
    self._set(''.join(map(chr, np.flatnonzero(is_there))))

  @property
  def vocab_size(self) -> int:
    return len(self.characters)

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    """Returns the tokens of `text` as int32 `[length]`.

    Raises:
      UserError: A character has no token.
    """
    tokens = np.empty(len(text), np.int32)
    for start in range(0, len(text), CHUNK_CHARS):
      codes = _code_points(text[start : start + CHUNK_CHARS])
      chunk = self._tokens[np.minimum(codes, len(self._tokens) - 1)]
      unknown = np.flatnonzero(chunk < 0)
      if unknown.size:
        at = start + int(unknown[0])
        raise UserError(
          f'character {text[at]!r} at position {at} is not in the vocabulary; '
          f'characters are {validation.shown(self.characters)}'
        )
      tokens[start : start + len(chunk)] = chunk
    return tokens

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    return ''.join(self.characters[int(t)] for t in tokens)

  def token_bytes(self) -> list[bytes]:
    return [c.encode() for c in self.characters]

  def state_dict(self) -> dict[str, Any]:
    return {'characters': self.characters}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    characters = state['characters']
    if not characters or characters != ''.join(sorted(set(characters))):
      raise ValueError('characters must be distinct, sorted and not empty')
    characters.encode()  # A lone surrogate raises ValueError.
    self._set(characters)

  def _set(self, characters: str) -> None:
    self.characters = characters
    codes = _code_points(characters)
    # Token of each code point; -1 for none. The last entry is for all larger
    # code points.
    self._tokens = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
    self._tokens[codes] = np.arange(len(codes))


def _code_points(text: str) -> UInt32[np.ndarray, ' length']:
  return np.frombuffer(text.encode('utf-32-le'), np.uint32)


class Bytes(Tokenizer):
  """Tokenizer with the 256 bytes of UTF-8, which encode any text."""

  fits_pieces = True
  vocab_size = 256

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    return bytes(int(t) for t in tokens).decode(errors='replace')

  def token_bytes(self) -> list[bytes]:
    return [bytes([b]) for b in range(256)]


TOKENIZERS = {'Characters': Characters, 'Bytes': Bytes, 'BPE': BPE}


def build(config: dict[str, Any]) -> Tokenizer:
  """Returns the tokenizer of a spec, without a vocabulary.

  Args:
    config: Type and arguments of the tokenizer, as in config.data.tokenizer.

  Raises:
    UserError: The type or an argument is wrong, or the type is not a Tokenizer.
  """
  tokenizer = spec.build('data.tokenizer', config, TOKENIZERS)
  if not isinstance(tokenizer, Tokenizer):
    raise UserError(
      f'data.tokenizer.type={config["type"]!r}: it is not a Tokenizer; it must '
      'be a nanomoe.data.tokenizer.Tokenizer'
    )
  return tokenizer


def load(config: dict[str, Any], path: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer of a run with its stored vocabulary.

  Args:
    config: Type and arguments of the tokenizer, as in config.data.tokenizer.
    path: Path of the run's vocabulary.json.

  Raises:
    UserError: The file is missing or damaged.
  """
  tokenizer = build(config)
  try:
    tokenizer.load_state_dict(read(path))
    if tokenizer.vocab_size < 1:
      raise ValueError('the vocabulary has no tokens')
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(f'{path}: the vocabulary is damaged ({error!r})') from error
  return tokenizer


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the contents of a vocabulary.json.

  Args:
    path: Path of the file.

  Returns:
    The state of the tokenizer, and `corpus` and `corpus_sha256`, the name and
    fingerprint of the text.

  Raises:
    UserError: The file is missing or damaged.
  """
  try:
    state = json.loads(path.read_text(encoding='utf-8-sig'))
    for key in ('corpus', 'corpus_sha256'):
      if not isinstance(state[key], str):
        raise ValueError(f'{key} must be a text')
    return state
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(f'{path}: the vocabulary is damaged ({error!r})') from error
