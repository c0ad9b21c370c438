"""Texts that exceed memory; they are read and tokenized in pieces."""

import bisect
import codecs
from collections.abc import Callable, Iterator, Mapping
import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
from typing import Any, NamedTuple

from jaxtyping import Int, Integer
import numpy as np

from trainers.errors import UserError
from trainers.runtime import watchdog

log = logging.getLogger(__name__)

# Bytes of a text in memory at once.
PIECE_BYTES = 1 << 17


class _Mark(NamedTuple):
  """Position in a file, as the numbers of bytes and characters before it."""

  byte: int
  char: int


class LargeText:
  """Part of a UTF-8 file that is read on demand, in place of a str.

  len() counts characters. A slice is a `LargeText`, and str() reads the whole
  part. Every method that reads the file raises `UserError` if the file has
  changed.

  Args:
    path: Path of the file.
    key: Flag or config key with its value, for errors.
    status: Status of the file when it was scanned; see `_status`.
    marks: Positions in the file, at most `PIECE_BYTES` apart.
    start: Position of the first character of the part.
    stop: Position after the last character of the part.
  """

  def __init__(
    self,
    path: pathlib.Path,
    key: str,
    status: tuple,
    marks: list[_Mark],
    start: _Mark,
    stop: _Mark,
  ):
    self._path, self._key, self._status = path, key, status
    self._marks = marks
    self._start, self._stop = start, stop

  def __len__(self) -> int:
    return self._stop.char - self._start.char

  def __getitem__(self, part: slice) -> 'LargeText':
    first, last, step = part.indices(len(self))
    if step != 1:
      raise ValueError(f'{step=} must be 1')
    start, stop = (self._at(i) for i in (first, max(first, last)))
    return LargeText(
      self._path, self._key, self._status, self._marks, start, stop
    )

  def __iter__(self) -> Iterator[str]:
    for piece in self.pieces():
      yield from piece

  def __str__(self) -> str:
    return ''.join(self.pieces())

  def pieces(self) -> Iterator[str]:
    """Yields the text in pieces, in order.

    Each piece after the first begins with the white space before a word. No
    word spans two pieces, so a tokenizer of words gives the pieces the tokens
    of the whole text.
    """
    rest = ''
    for piece in self.blocks():
      rest += piece
      # A text without white space is cut anywhere, to limit memory.
      at = last_word(rest) or (len(rest) > 4 * PIECE_BYTES and len(rest))
      if at:
        yield rest[:at]
        rest = rest[at:]
    if rest:
      yield rest

  def _at(self, position: int) -> _Mark:
    """Returns the mark of the character at `position` of this part."""
    char = self._start.char + position
    mark = self._marks[
      bisect.bisect_right(self._marks, char, key=lambda m: m.char) - 1
    ]
    with self._opened() as file:
      file.seek(mark.byte)
      text = file.read(4 * (char - mark.char)).decode(errors='ignore')
    before = text[: char - mark.char].encode()
    return _Mark(mark.byte + len(before), char)

  def blocks(self) -> Iterator[str]:
    """Yields the text from mark to mark, in blocks of about `PIECE_BYTES`."""
    ends = [m.byte for m in self._marks if m.byte > self._start.byte]
    with self._opened() as file:
      position = self._start.byte
      file.seek(position)
      for end in ends:
        end = min(end, self._stop.byte)
        if end > position:
          watchdog.beat()  # A pass over a large text takes minutes.
          yield file.read(end - position).decode(errors='replace')
        position = end

  @contextlib.contextmanager
  def _opened(self):
    """Opens the file; raises UserError if the file changes before the end."""
    try:
      with self._path.open('rb') as file:
        if _status(file) == self._status:
          yield file
        if _status(file) == self._status:
          return
    except OSError as error:
      raise UserError(f'{self._key}: {error.strerror}') from error
    raise changed(self._key)


def changed(key: str) -> UserError:
  """Returns the error of a file that changed while it was read."""
  return UserError(f'{key}: the file changed while it was read; try again')


def scan(path: pathlib.Path, key: str) -> tuple[LargeText, str]:
  """Returns the text at `path` and its SHA-256 in hexadecimal.

  Args:
    path: Path of the file.
    key: Flag or config key with its value, for errors.

  Raises:
    UserError: The file cannot be read, is not UTF-8, or changes during the
      scan.
  """
  decoder = codecs.getincrementaldecoder('utf-8')()
  digest = hashlib.sha256()
  marks = [_Mark(0, 0)]
  try:
    with path.open('rb') as file:
      status = _status(file)
      size = 0
      while True:
        raw = file.read(PIECE_BYTES)
        size += len(raw)
        digest.update(raw)
        held = decoder.getstate()[0]
        try:
          text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
          at = size - len(raw) - len(held) + error.start
          raise not_utf8(key, at, error) from error
        pending = len(decoder.getstate()[0])
        marks.append(_Mark(size - pending, marks[-1].char + len(text)))
        if not raw:
          break
      if _status(file) != status or size != marks[-1].byte:
        raise changed(key)
  except OSError as error:
    raise UserError(f'{key}: {error.strerror}') from error
  whole = LargeText(path, key, status, marks, marks[0], marks[-1])
  return whole, digest.hexdigest()


def not_utf8(key: str, at: int, error: UnicodeDecodeError) -> UserError:
  """Returns the error of a file that is not UTF-8.

  Args:
    key: Flag or config key with its value.
    at: Position of the first invalid byte in the file.
    error: Error of the decoder.
  """
  byte = error.object[error.start]
  # UTF-16 begins with one of these byte order marks, and little-endian UTF-32
  # with the first.
  utf16 = at == 0 and error.object[:2] in (b'\xff\xfe', b'\xfe\xff')
  hint = ', as in UTF-16; save it as UTF-8' if utf16 else ''
  return UserError(
    f'{key}: the file is not UTF-8, byte {at} is 0x{byte:02x}{hint}'
  )


def _status(file: Any) -> tuple:
  """Returns properties of an open file that differ after a change."""
  status = os.fstat(file.fileno())
  return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_whole(path: pathlib.Path, key: str) -> bytes:
  """Returns the bytes of the file at `path`.

  Args:
    path: Path of the file.
    key: Flag or config key with its value, for errors.

  Raises:
    UserError: The file cannot be read, or changes while it is read.
  """
  try:
    with path.open('rb') as file:
      status = _status(file)
      raw = file.read()
      if _status(file) != status or len(raw) != status[1]:
        raise changed(key)
      return raw
  except OSError as error:
    raise UserError(f'{key}: {error.strerror}') from error


def pieces(text: str | LargeText) -> Iterator[str]:
  """Yields the pieces of a `LargeText`; a str is a single piece."""
  if isinstance(text, LargeText):
    yield from text.pieces()
  elif text:
    yield text


def chunks(text: str | LargeText, size: int) -> Iterator[str]:
  """Yields chunks of `size` characters, the same for a str and a file."""
  rest = ''
  for block in [text] if isinstance(text, str) else text.blocks():
    rest += block
    whole = len(rest) - len(rest) % size
    for start in range(0, whole, size):
      yield rest[start : start + size]
    rest = rest[whole:]
  if rest:
    yield rest


def last_word(text: str) -> int:
  """Returns the start of the last white space that follows a word.

  Only the last 1000 characters are searched; 0 means no result.
  """
  for at in range(len(text) - 1, max(len(text) - 1000, 0), -1):
    if text[at] in ' \n\r\t' and not text[at - 1].isspace():
      return at
  return 0


EncodePieces = Callable[
  [str | LargeText], Iterator[tuple[str, Int[np.ndarray, ' length']]]
]


def tokenize(
  splits: Mapping[str, LargeText],
  encode_pieces: EncodePieces,
  vocab_size: int,
  fingerprint: str,
  directory: pathlib.Path,
) -> dict[str, Integer[np.ndarray, ' length']]:
  """Returns the tokens of each split, memory-mapped from a file.

  Later runs use the file again: its name is a hash of the text, of the lengths
  of the splits and of the tokens at the start of each split.

  Args:
    splits: Text of each split.
    encode_pieces: Method of a tokenizer that yields pieces of a text with their
      int32 tokens.
    vocab_size: Number of tokens in the vocabulary, which decides the dtype.
    fingerprint: Fingerprint of the text.
    directory: Directory of the file.

  Raises:
    UserError: A part of the text has no token, or the file cannot be written.
  """
  dtype = np.dtype(
    np.uint8
    if vocab_size <= 2**8
    else np.uint16
    if vocab_size <= 2**16
    else np.uint32
  )
  digest = hashlib.sha256(f'{fingerprint}:{vocab_size}'.encode())
  for name, text in splits.items():
    digest.update(f':{name}:{len(text)}:'.encode())
    num_bytes = 0
    for piece, tokens in encode_pieces(text):
      digest.update(tokens.tobytes())
      num_bytes += len(piece.encode())
      if num_bytes >= PIECE_BYTES // 2:
        break
  prefix = f'tokens-{digest.hexdigest()[:32]}'
  try:
    directory.mkdir(parents=True, exist_ok=True)
    found = _find(directory, prefix, dtype)
    if not found:
      _make(directory, prefix, dtype, splits, encode_pieces)
      found = _find(directory, prefix, dtype)
    path, lengths = found  # pyright: ignore
    whole = np.memmap(path, dtype, 'r')
  except OSError as error:
    raise UserError(
      f'{directory}: tokens of a large text cannot be cached '
      f'({error.strerror}); $XDG_CACHE_HOME can set another directory'
    ) from error
  ends = np.cumsum(lengths)
  return {
    name: whole[end - length : end]
    for name, length, end in zip(splits, lengths, ends, strict=True)
  }


def _find(
  directory: pathlib.Path, prefix: str, dtype: np.dtype
) -> tuple[pathlib.Path, list[int]] | None:
  """Returns the file and the number of tokens of each split, from its name."""
  for path in directory.glob(f'{prefix}-*.bin'):
    parts = path.stem.removeprefix(f'{prefix}-').split('-')
    lengths = [int(n) for n in parts if n.isdecimal()]
    if path.stat().st_size == sum(lengths) * dtype.itemsize > 0:
      return path, lengths
  return None


def _make(
  directory: pathlib.Path,
  prefix: str,
  dtype: np.dtype,
  splits: Mapping[str, LargeText],
  encode_pieces: EncodePieces,
) -> None:
  _remove_abandoned(directory)
  temporary = directory / f'.{prefix}.{os.getpid()}.tmp'
  total = sum(len(text) for text in splits.values())
  log.info('tokenizing %s characters, once, into %s', f'{total:,}', directory)
  lengths, done, logged = [], 0, 0
  try:
    with temporary.open('wb') as file:
      # The lock tells other processes that the file is in use.
      fcntl.flock(file, fcntl.LOCK_EX)
      for text in splits.values():
        length = 0
        for piece, tokens in encode_pieces(text):
          file.write(tokens.astype(dtype).tobytes())
          length += len(tokens)
          done += len(piece)
          if 10 * done // total > logged:
            logged = 10 * done // total
            log.info('tokenizing: %d0 %%', logged)
        lengths.append(length)
      file.flush()
      os.fsync(file.fileno())
      name = '-'.join(map(str, [prefix, *lengths]))
      os.replace(temporary, directory / f'{name}.bin')
  finally:
    temporary.unlink(missing_ok=True)


def _remove_abandoned(directory: pathlib.Path) -> None:
  """Removes files of killed processes, whose locks are free."""
  for path in directory.glob('.tokens-*.tmp'):
    with contextlib.suppress(OSError), path.open('rb') as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      path.unlink()
