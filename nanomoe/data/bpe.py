"""Byte-level byte-pair encoding with the `tokenizers` library."""

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
# Bytes after a cut that must have the same tokens with and without the text
# before the cut. They exceed the look-ahead of a pre-tokenizer and the length
# of an added token.
LOOK_AHEAD = 1 << 10
# Characters that a word of a tokenizer.json may have; a longer word is cut.
MAX_WORD = 1 << 19
# Value of 'cuts' in the state of a tokenizer: texts are cut between words.
CUTS = 'between words'
# Number of cuts of each kind that are tried before a piece grows.
_TRIED_CUTS = 8


class BPE(Tokenizer):
  """Tokenizer that merges frequent pairs of bytes. Sennrich et al. 2016.

  Tokens consist of bytes (Radford et al. 2019), so any text has tokens, and
  decoding returns the same text. Words are split after 256 characters, so
  learning a text without white space takes linear time. A tokenizer.json has
  rules of its own for words.

  A text of any size is learned and encoded in pieces that are cut between
  words. A piece takes 5 times its size in memory for ASCII and at most 16 times
  for other texts. Learning takes 50 more bytes for each byte of the distinct
  words.

  Args:
    vocab_size: Number of tokens, the 256 bytes included; the others are learned
      from the training split.
    file: Path of a byte-level tokenizer.json; empty learns a vocabulary.

  Raises:
    ValueError: vocab_size is out of range.
  """

  fits_pieces = True

  def __init__(self, vocab_size: int = 1024, file: str = ''):
    if vocab_size < 256:
      raise ValueError(f'{vocab_size=} must be >= 256: one for each byte')
    if vocab_size > MAX_VOCAB_SIZE:
      raise ValueError(f'{vocab_size=} must be <= {MAX_VOCAB_SIZE}')
    self._requested_size = vocab_size
    self._file = file
    self._cuts_between_words = True

  def fit(self, texts: Mapping[str, str | LargeText]) -> None:
    """Learns merges from the training split, or reads `file`.

    Args:
      texts: Text of each split.

    Raises:
      UserError: `file` cannot be read, is not byte-level, or changes `texts`.
    """
    if self._file:
      self._read(texts)
    else:
      self._set(merges.learn(self._requested_size, texts['train']))

  def _read(self, texts: Mapping[str, str | LargeText]) -> None:
    where = f'data.tokenizer.file={self._file!r}'
    try:
      raw = pathlib.Path(self._file).read_text(encoding='utf-8-sig')
      self._set(tokenizer_json.load(json.loads(raw)))
      for text in texts.values():
        for _ in self._pieces_with_progress(text):
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
    """Returns the tokens of `text` as int32 `[length]`.

    Raises:
      UserError: Decoding the tokens gives another text.
    """
    parts = [tokens for _, tokens in self._pieces_with_progress(text)]
    return np.concatenate([np.zeros(0, np.int32), *parts])

  def _pieces_with_progress(
    self, text: str | LargeText
  ) -> Iterator[tuple[str, Int[np.ndarray, ' length']]]:
    """Yields the results of `_pieces` and logs progress periodically."""
    logged_at, done = time.monotonic(), 0
    for piece, tokens in self._pieces(large_text.chunks(text, PIECE_CHARS)):
      yield piece, tokens
      done += len(piece)
      if time.monotonic() - logged_at > merges.PROGRESS_SECONDS:
        logged_at = time.monotonic()
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
    """Yields pieces of a text with their tokens.

    The tokens of all pieces together are the tokens of the whole text. A piece
    without a possible cut grows.
    """
    rest, position, min_chars = '', 0, PIECE_CHARS
    for chunk in chunks:
      if rest and len(rest) >= min_chars:
        encoding, tokens = self._encode(rest, position)
        num_tokens, cut = self._cut(rest, encoding)
        if not cut and self._cuts_between_words and len(rest) >= MAX_WORD:
          num_tokens, cut = len(tokens), len(rest)
        if cut:
          yield rest[:cut], tokens[:num_tokens]
          rest, position = rest[cut:], position + cut
        min_chars = PIECE_CHARS if cut else 2 * len(rest)
      rest += chunk
    if rest:
      yield rest, self._encode(rest, position)[1]

  def _encode(
    self, text: str, position: int
  ) -> tuple[library.Encoding, Int[np.ndarray, ' length']]:
    """Returns the encoding of `text` and its tokens.

    Args:
      text: Piece of a text.
      position: Number of characters before the piece, for the error.

    Raises:
      _Lossy: The bytes of the tokens differ from the bytes of `text`.
    """
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    decoded, expected = b''.join([self._bytes[i] for i in ids]), text.encode()
    if decoded != expected:
      same = sum(
        itertools.takewhile(
          bool, (a == b for a, b in zip(decoded, expected, strict=False))
        )
      )
      at = len(expected[:same].decode(errors='ignore'))
      same = len(text[:at].encode())
      changed = decoded[same : same + 20].decode(errors='replace')
      normalizer = self._tokenizer.normalizer
      cause = f' (normalizer {type(normalizer).__name__})' if normalizer else ''
      raise _Lossy(
        f'the tokenizer changes character {position + at:,}, '
        f'{text[at : at + 20]!r} to {changed!r}{cause}; decoding must return '
        'the same text'
      )
    return encoding, np.array(ids, np.int32)

  def _cut(self, text: str, encoding: library.Encoding) -> tuple[int, int]:
    """Returns the numbers of tokens and characters before the last cut, or 0s.

    A cut is between two words. The tokens of the text after a cut do not depend
    on the text before it. Cuts before white space are preferred.
    """
    utf8, ids = text.encode(), encoding.ids
    raw = np.frombuffer(utf8, np.uint8)
    ends = np.cumsum(self._num_bytes[ids])
    begins = np.flatnonzero(np.diff(np.array(encoding.word_ids))) + 1
    places = ends[begins - 1]
    # More text may change the tokens near the end, and a cut inside a UTF-8
    # character would be invalid.
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
    return state | ({'cuts': CUTS} if self._cuts_between_words else {})

  def load_state_dict(self, state: dict[str, Any]) -> None:
    self._set(tokenizer_json.load(state['tokenizer']))
    # States of older versions lack 'cuts': those versions cut large texts at
    # other positions.
    self._cuts_between_words = state.get('cuts') == CUTS

  def _set(self, tokenizer: library.Tokenizer) -> None:
    self._bytes = tokenizer_json.bytes_of_tokens(tokenizer)
    self._num_bytes = np.array([len(b) for b in self._bytes], np.int64)
    self._tokenizer = tokenizer


class _Lossy(UserError):
  """Error of a tokenizer whose tokens do not decode to the same text."""
