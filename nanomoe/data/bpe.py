"""Byte-level byte-pair encoding, by the `tokenizers` library."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import itertools
import json
import logging
import pathlib
import time
from typing import Any

from jaxtyping import Int
import numpy as np
import tokenizers as library

from nanomoe.data import large_text, merges, tokenizer_json
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.data.tokenizer_json import MAX_VOCAB_SIZE
from trainers.errors import UserError

log = logging.getLogger(__name__)

# Characters that are encoded at once: the library's memory grows with them.
PIECE_CHARS = 1 << 14
# Bytes after a cut that must have the same tokens with and without what is
# before it. Longer than what a pre-tokenizer looks ahead, or an added token.
LOOK_AHEAD = 1 << 10
# Characters that a word of a tokenizer.json may have; a longer one is cut.
MAX_WORD = 1 << 19
_CUTS = 'between words'  # In the state of a tokenizer: how texts are cut.
_TRIED_CUTS = 8  # Of each kind, before a piece is made longer.


class BPE(Tokenizer):
  """Merges of bytes that often stand together. Sennrich et al. 2016.

  Of bytes (Radford et al. 2019): any text has tokens, and comes back as it was.
  Words above 256 characters are split there, so that a text without white space
  is learned in linear time; a tokenizer.json has its own rules for words.

  A text of any size is learned and encoded in pieces, cut between words. This
  takes 5 times its size in memory for ASCII, at most 16 times for other texts;
  learning takes 50 bytes more for each byte of the words that differ.

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
    self._cuts_between_words = True

  def fit(self, texts: Mapping[str, str | LargeText]) -> None:
    """Raises UserError if `file` is none, or does not give `texts` back."""
    if self._file:
      self._read(texts)
    else:
      self._set(merges.learn(self._wanted, texts['train']))

  def _read(self, texts: Mapping[str, str | LargeText]) -> None:
    where = f'data.tokenizer.file={self._file!r}'
    try:
      raw = pathlib.Path(self._file).read_text(encoding='utf-8-sig')
      self._set(tokenizer_json.load(json.loads(raw)))
      for text in texts.values():
        for _ in self._told(text):
          pass
    except OSError as error:
      raise UserError(f'{where}: {error.strerror}') from error
    except _Lossy as error:
      raise UserError(f'{where}: {error}') from error
    except (ValueError, RecursionError) as error:
      raise UserError(
        f'{where}: {error}; it must be a byte-level tokenizer.json'
      ) from error

  @property
  def vocab_size(self) -> int:
    return len(self._bytes)

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    """Raises UserError if the tokens do not give `text` back."""
    parts = [tokens for _, tokens in self._told(text)]
    return np.concatenate([np.zeros(0, np.int32), *parts])

  def _told(self, text: str | LargeText):
    """Yields as `_pieces` does, with a line of progress now and then."""
    told, done = time.monotonic(), 0
    for piece, tokens in self._pieces(large_text.chunks(text, PIECE_CHARS)):
      yield piece, tokens
      done += len(piece)
      if time.monotonic() - told > merges.PROGRESS_SECONDS:
        told = time.monotonic()
        log.info('tokenizing: %d %%', 100 * done // len(text))

  def encode_pieces(
    self, text: str | LargeText
  ) -> Iterator[tuple[str, Int[np.ndarray, ' length']]]:
    if self._cuts_between_words or isinstance(text, str):
      yield from self._pieces(large_text.chunks(text, PIECE_CHARS))
    else:
      yield from super().encode_pieces(text)

  def _pieces(
    self, chunks: Iterable[str]
  ) -> Iterator[tuple[str, Int[np.ndarray, ' length']]]:
    """Yields pieces of a text and their tokens, which are those of the whole.

    A piece that can be cut nowhere grows.
    """
    rest, position, wanted = '', 0, PIECE_CHARS
    for chunk in chunks:
      if rest and len(rest) >= wanted:
        encoding, tokens = self._encode(rest, position)
        num_tokens, cut = self._cut(rest, encoding)
        if not cut and self._cuts_between_words and len(rest) >= MAX_WORD:
          num_tokens, cut = len(tokens), len(rest)
        if cut:
          yield rest[:cut], tokens[:num_tokens]
          rest, position = rest[cut:], position + cut
        wanted = PIECE_CHARS if cut else 2 * len(rest)
      rest += chunk
    if rest:
      yield rest, self._encode(rest, position)[1]

  def _encode(
    self, text: str, position: int
  ) -> tuple[library.Encoding, Int[np.ndarray, ' length']]:
    """Raises _Lossy if the tokens' bytes are not those of `text`."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    found, wanted = b''.join([self._bytes[i] for i in ids]), text.encode()
    if found != wanted:
      same = sum(
        itertools.takewhile(
          bool, (a == b for a, b in zip(found, wanted, strict=False))
        )
      )
      at = len(wanted[:same].decode(errors='ignore'))
      same = len(text[:at].encode())
      became = found[same : same + 20].decode(errors='replace')
      normalizer = self._tokenizer.normalizer
      by = (
        f' by its {type(normalizer).__name__} normalizer' if normalizer else ''
      )
      raise _Lossy(
        f'character {position + at:,}: {text[at : at + 20]!r} becomes '
        f'{became!r}{by}, so the text does not come back as it was'
      )
    return encoding, np.array(ids, np.int32)

  def _cut(self, text: str, encoding: library.Encoding) -> tuple[int, int]:
    """Returns how many tokens, and characters, are before the last cut; or 0s.

    A cut is between two words, and the tokens of what follows it are the same
    without what is before it. Cuts in front of white space come first.
    """
    utf8, ids = text.encode(), encoding.ids
    raw = np.frombuffer(utf8, np.uint8)
    ends = np.cumsum(self._num_bytes[ids])
    begins = np.flatnonzero(np.diff(np.array(encoding.word_ids))) + 1
    places = ends[begins - 1]
    # Neither near the end, which more text may change, nor in a character.
    near = np.minimum(places, len(raw) - 1)
    allowed = (places <= len(raw) - LOOK_AHEAD) & (raw[near] & 0xC0 != 0x80)
    begins, places = begins[allowed], places[allowed]
    white = np.frombuffer(b' \n\r\t', np.uint8)
    is_space = np.isin(raw[places], white) & ~np.isin(raw[places - 1], white)
    for kind in (is_space, ~is_space):
      for i in np.flatnonzero(kind)[: -_TRIED_CUTS - 1 : -1]:
        after = utf8[places[i] :].decode()
        again = self._tokenizer.encode(after, add_special_tokens=False).ids
        if again == ids[begins[i] :]:
          return int(begins[i]), len(text) - len(after)
    return 0, 0

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    pieces = (self._bytes[int(t)] for t in tokens)
    return b''.join(pieces).decode(errors='replace')

  def token_bytes(self) -> list[bytes]:
    return self._bytes

  def state_dict(self) -> dict[str, Any]:
    state = {'tokenizer': json.loads(self._tokenizer.to_str())}
    return state | ({'cuts': _CUTS} if self._cuts_between_words else {})

  def load_state_dict(self, state: dict[str, Any]) -> None:
    self._set(tokenizer_json.load(state['tokenizer']))
    # Runs of older versions lack it: their large texts were cut elsewhere.
    self._cuts_between_words = state.get('cuts') == _CUTS

  def _set(self, tokenizer: library.Tokenizer) -> None:
    self._bytes = tokenizer_json.bytes_of_tokens(tokenizer)
    self._num_bytes = np.array([len(b) for b in self._bytes], np.int64)
    self._tokenizer = tokenizer


class _Lossy(UserError):
  """The tokens of a text are not the text."""
