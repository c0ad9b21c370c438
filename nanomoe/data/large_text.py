"""Texts that are too large to hold: read, and tokenized, piece by piece."""

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

log = logging.getLogger(__name__)

# Of a text in memory at once.
PIECE_BYTES = 1 << 17


class _Mark(NamedTuple):
  """A place in a file: bytes before it, and characters."""

  byte: int
  char: int


class LargeText:
  """A part of a UTF-8 file in place of a str: read when it is needed.

  len() is in characters; a slice is a LargeText too; str() is all of it.

  Raises, wherever it is read:
    UserError: the file is not what it was any more.
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
    """In their order; each, but the first, begins with the space of a word.

    So a tokenizer that looks at words makes of all pieces what it makes of the
    whole: its words do not go from one piece to the next.
    """
    rest = ''
    for piece in self.blocks():
      rest += piece
      # Where nothing is like a word, somewhere.
      at = last_word(rest) or (len(rest) > 4 * PIECE_BYTES and len(rest))
      if at:
        yield rest[:at]
        rest = rest[at:]
    if rest:
      yield rest

  def _at(self, position: int) -> _Mark:
    """Of the character at `position`."""
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
    """From mark to mark: about `PIECE_BYTES` each."""
    ends = [m.byte for m in self._marks if m.byte > self._start.byte]
    with self._opened() as file:
      place = self._start.byte
      file.seek(place)
      for end in ends:
        end = min(end, self._stop.byte)
        if end > place:
          yield file.read(end - place).decode(errors='replace')
        place = end

  @contextlib.contextmanager
  def _opened(self):
    """Raises UserError if it has changed, before or meanwhile."""
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
  return UserError(f'{key} has changed while it was read: try again')


def scan(path: pathlib.Path, key: str) -> tuple[LargeText, str]:
  """The text at `path`, and its SHA-256.

  Args:
    path: of the file.
    key: what to call it in errors.

  Raises:
    UserError: it cannot be read, or is not UTF-8, or changes meanwhile.
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
  byte = error.object[error.start]
  # The byte order marks of UTF-16, which UTF-32 begins with too, or has next.
  utf16 = at == 0 and error.object[:2] in (b'\xff\xfe', b'\xfe\xff')
  hint = '; it looks like UTF-16: save it as UTF-8' if utf16 else ''
  return UserError(f'{key} is not UTF-8: byte {at} is 0x{byte:02x}{hint}')


def _status(file: Any) -> tuple:
  """What differs once a file has changed."""
  status = os.fstat(file.fileno())
  return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_whole(path: pathlib.Path, key: str) -> bytes:
  """Raises UserError if it cannot be read, or changes meanwhile."""
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
  """Of a str, itself."""
  if isinstance(text, LargeText):
    yield from text.pieces()
  elif text:
    yield text


def chunks(text: str | LargeText, size: int) -> Iterator[str]:
  """Yields `size` characters at a time: the same of a str and of a file."""
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
  """Where the last white space after something else begins; 0: not near."""
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
  """The tokens of each split, memory-mapped from a file in `directory`.

  The file is found again: its name is a hash of the text, of where it is split,
  and of how its beginning is tokenized.

  Args:
    encode_pieces: of a tokenizer: pieces, and int32 tokens below `vocab_size`.
    fingerprint: of the text.

  Raises:
    UserError: a part of the text has no token, or there is no room for the
      file.
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
      f'the tokens of a large text are kept in {directory}, which '
      f'$XDG_CACHE_HOME can change: {error.strerror}'
    ) from error
  ends = np.cumsum(lengths)
  return {
    name: whole[end - length : end]
    for name, length, end in zip(splits, lengths, ends, strict=True)
  }


def _find(
  directory: pathlib.Path, prefix: str, dtype: np.dtype
) -> tuple[pathlib.Path, list[int]] | None:
  """The file, and how many tokens of each split are in it: its name tells."""
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
  lengths, done, told = [], 0, 0
  try:
    with temporary.open('wb') as file:
      fcntl.flock(file, fcntl.LOCK_EX)  # While it is held, it is in use.
      for text in splits.values():
        length = 0
        for piece, tokens in encode_pieces(text):
          file.write(tokens.astype(dtype).tobytes())
          length += len(tokens)
          done += len(piece)
          if 10 * done // total > told:
            told = 10 * done // total
            log.info('tokenizing: %d0 %%', told)
        lengths.append(length)
      file.flush()
      os.fsync(file.fileno())
      name = '-'.join(map(str, [prefix, *lengths]))
      os.replace(temporary, directory / f'{name}.bin')
  finally:
    temporary.unlink(missing_ok=True)


def _remove_abandoned(directory: pathlib.Path) -> None:
  """What a process that was killed has left: nobody holds its lock."""
  for path in directory.glob('.tokens-*.tmp'):
    with contextlib.suppress(OSError), path.open('rb') as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      path.unlink()
