"""Text <-> integers."""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from jaxtyping import Int
import numpy as np

from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizer import Tokenizer
from trainers import spec
from trainers.errors import UserError


class Characters(Tokenizer):
  """One token for each distinct character, in the order of code points."""

  def __init__(self):
    self.characters = ''

  def fit(self, texts: Mapping[str, str]) -> None:
    self._set(''.join(sorted(set().union(*texts.values()))))

  @property
  def vocab_size(self) -> int:
    return len(self.characters)

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    """Raises UserError naming a character without a token, and its position."""
    codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
    tokens = np.searchsorted(self._codes, codes)
    unknown = np.flatnonzero(~np.isin(codes, self._codes))
    if unknown.size:
      at = int(unknown[0])
      raise UserError(
        f'character {text[at]!r} at position {at} is not in the vocabulary: '
        f'{self.characters!r}'
      )
    return tokens.astype(np.int32)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    return ''.join(self.characters[int(t)] for t in tokens)

  def token_bytes(self) -> list[bytes]:
    return [c.encode() for c in self.characters]

  def state_dict(self) -> dict[str, Any]:
    return {'characters': self.characters}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    characters = state['characters']
    if characters != ''.join(sorted(set(characters))):
      raise ValueError('its characters are not in order, or occur twice')
    self._set(characters)

  def _set(self, characters: str) -> None:
    self.characters = characters
    self._codes = np.array([ord(c) for c in characters], np.uint32)


class Bytes(Tokenizer):
  """The 256 bytes of UTF-8: any text, and nothing to learn."""

  vocab_size = 256

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    return bytes(int(t) for t in tokens).decode(errors='replace')

  def token_bytes(self) -> list[bytes]:
    return [bytes([b]) for b in range(256)]


TOKENIZERS = {'Characters': Characters, 'Bytes': Bytes, 'BPE': BPE}


def build(config: dict[str, Any]) -> Tokenizer:
  """What `config.data.tokenizer` describes, not yet fit."""
  tokenizer = spec.build('data.tokenizer', config, TOKENIZERS)
  if not isinstance(tokenizer, Tokenizer):
    raise UserError(
      f'data.tokenizer.type={config["type"]!r} is not a '
      'nanomoe.data.tokenizer.Tokenizer'
    )
  return tokenizer


def load(config: dict[str, Any], path: pathlib.Path) -> Tokenizer:
  """The tokenizer that a run stored in its vocabulary.json.

  Raises:
    UserError: the file is missing, or is no vocabulary.
  """
  tokenizer = build(config)
  try:
    tokenizer.load_state_dict(read(path))
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise UserError(f'{path} is damaged: {error!r}') from error
  return tokenizer


def read(path: pathlib.Path) -> dict[str, Any]:
  """vocabulary.json: a tokenizer's state, and the `corpus` that it is of.

  Raises:
    UserError: the file is missing, or is no vocabulary.
  """
  try:
    state = json.loads(path.read_text(encoding='utf-8'))
    for key in ('corpus', 'corpus_sha256'):
      if not isinstance(state[key], str):
        raise ValueError(f'its {key} is no text')
    return state
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(f'{path} is damaged: {error!r}') from error
