"""Byte-level byte-pair encoding, by the `tokenizers` library."""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from jaxtyping import Int
import numpy as np
import tokenizers as library

from nanomoe.data import large_text
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from trainers.errors import UserError

# Far beyond any model's. The library aborts the process where it finds no
# memory for them.
MAX_VOCAB_SIZE = 2**22


class BPE(Tokenizer):
  """Merges of bytes that often stand together. Sennrich et al. 2016.

  Of bytes (Radford et al. 2019): any text has tokens, and comes back as it was.

  Args:
    vocab_size: tokens to learn from the training split; 256 are the bytes.
    file: a tokenizer.json to use instead of learning; it must be byte-level.
  """

  fits_pieces = True

  def __init__(self, vocab_size: int = 1024, file: str = ''):
    if vocab_size < 256:
      raise ValueError(f'{vocab_size=} must be >= 256: one for each byte')
    if vocab_size > MAX_VOCAB_SIZE:
      raise ValueError(f'{vocab_size=} must be <= {MAX_VOCAB_SIZE}')
    self._wanted = vocab_size
    self._file = file

  def fit(self, texts: Mapping[str, str | LargeText]) -> None:
    """Raises UserError if `file` is none, or does not give `texts` back."""
    if self._file:
      self._read(texts)
      return
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(  # pyright: ignore
      add_prefix_space=False
    )
    trainer = library.trainers.BpeTrainer(  # pyright: ignore
      vocab_size=self._wanted,
      show_progress=False,
      initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(large_text.pieces(texts['train']), trainer)
    self._set(tokenizer)

  def _read(self, texts: Mapping[str, str | LargeText]) -> None:
    where = f'data.tokenizer.file={self._file!r}'
    try:
      file = pathlib.Path(self._file)
      state = json.loads(file.read_text(encoding='utf-8-sig'))
      self.load_state_dict({'tokenizer': state})
      lossless = all(
        self.decode(self.encode(piece)) == piece
        for text in texts.values()
        for piece in large_text.pieces(text)
      )
      if not lossless:
        raise ValueError('it does not give the text back as it was')
    except OSError as error:
      raise UserError(f'{where}: {error.strerror}') from error
    except ValueError as error:
      raise UserError(
        f'{where}: {error}; it must be a byte-level tokenizer.json'
      ) from error

  @property
  def vocab_size(self) -> int:
    return len(self._bytes)

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    pieces = (self._bytes[int(t)] for t in tokens)
    return b''.join(pieces).decode(errors='replace')

  def token_bytes(self) -> list[bytes]:
    return self._bytes

  def state_dict(self) -> dict[str, Any]:
    return {'tokenizer': json.loads(self._tokenizer.to_str())}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    text = json.dumps(state['tokenizer'])
    try:
      tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing more exact.
      raise ValueError(str(error)) from error
    self._set(tokenizer)

  def _set(self, tokenizer: library.Tokenizer) -> None:
    self._tokenizer = tokenizer
    byte_of = _byte_of_character()
    vocabulary = tokenizer.get_vocab()
    # An index far beyond them, and a table of all indices fills the memory.
    if max(vocabulary.values(), default=0) > MAX_VOCAB_SIZE:
      raise ValueError(f'it has a token beyond {MAX_VOCAB_SIZE}')
    strangers = sorted(set().union(*vocabulary) - set(byte_of))
    if strangers:
      raise ValueError(f'its tokens hold {strangers[0]!r}, which is no byte')
    self._bytes = [b''] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
      self._bytes[index] = bytes(byte_of[c] for c in token)


def _byte_of_character() -> dict[str, int]:
  """The byte that a character stands for in a byte-level vocabulary.

  Printable ones for themselves; the others, in order, for those that are left.
  """
  alphabet = set(library.pre_tokenizers.ByteLevel.alphabet())
  own = {chr(b): b for b in range(256) if chr(b) in alphabet}
  others = [b for b in range(256) if chr(b) not in alphabet]
  return own | dict(zip(sorted(alphabet - set(own)), others, strict=True))
