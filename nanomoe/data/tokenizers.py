"""Text <-> integers."""

from collections.abc import Sequence
import json
import pathlib

import numpy as np

from trainers.errors import UserError


class Characters:
  """One token for each distinct character, in the order of code points."""

  def __init__(self, characters: str):
    self.characters = characters
    self._codes = np.array([ord(c) for c in characters], np.uint32)

  @classmethod
  def of(cls, text: str) -> 'Characters':
    return cls(''.join(sorted(set(text))))

  @property
  def vocab_size(self) -> int:
    return len(self.characters)

  def encode(self, text: str) -> np.ndarray:
    """int32[len(text)].

    Raises:
      UserError: naming a character that has no token, and its position.
    """
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

  def state_dict(self) -> dict[str, str]:
    """JSON: what vocabulary.json holds."""
    return {'type': 'Characters', 'characters': self.characters}


def load(path: pathlib.Path) -> Characters:
  """The tokenizer that a run stored in its vocabulary.json.

  Raises:
    UserError: the file is missing, or is no vocabulary.
  """
  return Characters(read(path)['characters'])


def read(path: pathlib.Path) -> dict[str, str]:
  """vocabulary.json: `characters`, and the `corpus` they are of, checked.

  Raises:
    UserError: the file is missing, or is no vocabulary.
  """
  try:
    state = json.loads(path.read_text(encoding='utf-8'))
    characters = state['characters']
    if characters != ''.join(sorted(set(characters))):
      raise ValueError('its characters are not in order, or occur twice')
    for key in ('corpus', 'corpus_sha256'):
      if not isinstance(state[key], str):
        raise ValueError(f'its {key} is no text')
    return state
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, TypeError, KeyError, RecursionError) as error:
    raise UserError(f'{path} is damaged: {error!r}') from error
