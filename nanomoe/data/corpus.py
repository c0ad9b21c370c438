"""Sources of the training text: a file, Tiny Shakespeare or embedded texts."""

from collections.abc import Callable, Iterator
import hashlib
import http.client
import importlib
import logging
import os
import pathlib
import stat
import threading
import time
from typing import NamedTuple
import urllib.request

from nanomoe.config import home
from nanomoe.data import large_text
from nanomoe.data.large_text import LargeText
from nanomoe.run import cache
from trainers.errors import UserError
from trainers.files import write_atomically

log = logging.getLogger(__name__)

NAME = 'tinyshakespeare'
FILE = f'{NAME}.txt'
URL = (
  'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/'
  'tinyshakespeare/input.txt'
)
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
MARK = '\ufeff'  # Byte order mark of UTF-8.
GIVE_UP_SECONDS = 10
IN_MEMORY_BYTES = 1 << 25  # A larger text stays on disk.
PROGRESS_BYTES = 200_000  # Bytes between two progress lines.


class Corpus(NamedTuple):
  """Training text with its name and fingerprint.

  Attributes:
    name: Name of the text or of its file.
    text: The text; a `LargeText` above `IN_MEMORY_BYTES` bytes.
    fingerprint: SHA-256 of the UTF-8 bytes, in hexadecimal.
  """

  name: str
  text: str | LargeText
  fingerprint: str


def find(path: str, fallback: str, recorded: str = '') -> Corpus:
  """Returns the text at `path`, or Tiny Shakespeare, or `fallback`.

  Tiny Shakespeare is searched in $NANOMOE_DATA_DIR, in the user's cache
  directory and on the network, in this order.

  Args:
    path: Path of a UTF-8 text; empty selects Tiny Shakespeare.
    fallback: Name in `EMBEDDED` of the text that replaces Tiny Shakespeare,
      with a warning; '' raises an error instead.
    recorded: SHA-256 of the text that the run began with; see `read`.

  Returns:
    The text with its name and fingerprint.

  Raises:
    UserError: No text was found, or the file at `path` is not a text.
  """
  if path:
    return read(path, recorded=recorded)
  raw = _local_copy() or _downloaded()
  if raw:
    return Corpus(NAME, raw.decode(), SHA256)
  where = (
    f'Tiny Shakespeare was not found: there is no intact {FILE} in '
    f'$NANOMOE_DATA_DIR or in {cache.directory()}, and the download failed'
  )
  if not fallback:
    raise UserError(
      f"data.path='': {where}; put the file into one of these directories, or "
      'set --config.data.path=FILE'
    )
  log.warning('WARNING: %s.', where)
  log.warning('WARNING: training on %s INSTEAD of Tiny Shakespeare.', fallback)
  text = EMBEDDED[fallback]()
  return Corpus(fallback, text, _sha256(text.encode()))


def find_again(path: str, name: str, sha256: str) -> Corpus:
  """Returns the text that a run was trained on.

  Args:
    path: Value of data.path in the run.
    name: Name of the text in the run.
    sha256: Fingerprint of the text in the run.

  Returns:
    The text, read again from its source.

  Raises:
    UserError: The text was not found, or it has changed.
  """
  if not path and name in EMBEDDED:
    text = EMBEDDED[name]()
    corpus = Corpus(name, text, _sha256(text.encode()))
  else:
    corpus = find(path, fallback='', recorded=sha256)
  if corpus.fingerprint != sha256:
    raise UserError(
      f'data.path={path!r}: the text has changed from {name} (SHA-256 '
      f'{sha256[:16]}) to {corpus.name} (SHA-256 {corpus.fingerprint[:16]}); '
      '--allow_changed=data resumes with the new text'
    )
  return corpus


def path_problems(path: str, key: str = 'data.path') -> list[str]:
  """Returns a line for each problem with a text file, without reading it.

  Args:
    path: Path of the file.
    key: Flag or config key of the path, for errors.
  """
  try:
    status = os.stat(path)
  except (OSError, ValueError) as error:
    reason = str(getattr(error, 'strerror', error)).lower()
    return [f'{key}={path!r}: {reason}']
  if not stat.S_ISREG(status.st_mode):  # Reading a FIFO could block forever.
    directory = stat.S_ISDIR(status.st_mode)
    kind = 'a directory' if directory else 'not a regular file'
    return [f'{key}={path!r}: the path is {kind}; it must be a text file']
  if not status.st_size:
    return [f'{key}={path!r}: the file is empty; it must contain a text']
  return []


def read(path: str, key: str = 'data.path', recorded: str = '') -> Corpus:
  """Returns the text at `path` without a byte order mark (U+FEFF) at its start.

  Args:
    path: Path of the file.
    key: Flag or config key of the path, for errors.
    recorded: SHA-256 of the text that the run began with. Older versions kept
      the mark as a token; the mark stays if this is the hash of the whole file.

  Returns:
    The text with its name and fingerprint.

  Raises:
    UserError: The file does not exist, or it is not a UTF-8 text.
  """
  if lines := path_problems(path, key):
    raise UserError(lines)
  file, where = pathlib.Path(path), f'{key}={path!r}'
  if file.stat().st_size > IN_MEMORY_BYTES:
    corpus = Corpus(file.name, *large_text.scan(file, where))
  else:
    raw = large_text.read_whole(file, where)
    try:
      corpus = Corpus(file.name, raw.decode(), _sha256(raw))
    except UnicodeDecodeError as error:
      raise large_text.not_utf8(where, error.start, error) from error
  if str(corpus.text[:1]) != MARK or corpus.fingerprint == recorded:
    return corpus
  return _without_mark(corpus, where)


def _without_mark(corpus: Corpus, where: str) -> Corpus:
  """Returns the corpus without its mark, with the fingerprint of the rest."""
  text = corpus.text[1:]
  if not len(text):
    raise UserError(
      f'{where}: the file is empty except for a byte order mark; it must '
      'contain a text'
    )
  log.info('%s: dropped the byte order mark', where)
  digest = hashlib.sha256()
  for piece in large_text.pieces(text):
    digest.update(piece.encode())
  return Corpus(corpus.name, text, digest.hexdigest())


def _sha256(raw: bytes) -> str:
  return hashlib.sha256(raw).hexdigest()


def _local_copy() -> bytes | None:
  for directory in _directories():
    try:
      raw = (directory / FILE).read_bytes()
    except OSError:
      continue
    if _sha256(raw) == SHA256:
      return raw
    log.warning(
      'WARNING: %s is not Tiny Shakespeare (its SHA-256 differs) and is not '
      'used; --config.data.path=FILE trains on it',
      directory / FILE,
    )
  return None


def _directories() -> Iterator[pathlib.Path]:
  if directory := home.variable('NANOMOE_DATA_DIR'):
    yield pathlib.Path(directory)
  yield cache.directory()


def _downloaded() -> bytes | None:
  """Returns the text at `URL` and caches it; None if the download fails."""
  log.info('downloading %s', URL)
  raw = _download(URL)
  if raw is None:
    return None
  if _sha256(raw) != SHA256:
    log.warning('WARNING: the file at %s has changed (SHA-256 differs)', URL)
    return None
  target = cache.directory() / FILE
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, raw.decode())
  except OSError as error:  # The cache is optional: `raw` is complete.
    log.warning('%s could not be written: %s', target, error)
  return raw


def _download(url: str) -> bytes | None:
  """Returns the bytes at `url`, or None if the download fails.

  The download fails if no byte arrives for `GIVE_UP_SECONDS`. It runs in a
  separate thread, because the lookup of a host name has no timeout.
  """
  chunks: list[bytes] = []
  done, failed = threading.Event(), threading.Event()
  arrived = [time.monotonic()]

  def read():
    try:
      with urllib.request.urlopen(url, timeout=GIVE_UP_SECONDS) as response:
        while chunk := response.read1(1 << 16):
          chunks.append(chunk)
          arrived[0] = time.monotonic()
    except (OSError, http.client.HTTPException) as error:
      log.info('download failed: %s', error)
      failed.set()
    done.set()

  threading.Thread(target=read, daemon=True).start()
  logged = 0
  while not done.wait(0.1):
    if time.monotonic() - arrived[0] > GIVE_UP_SECONDS:
      log.info('download failed: no data for %d s', GIVE_UP_SECONDS)
      return None
    if (size := sum(map(len, chunks))) - logged > PROGRESS_BYTES:
      logged = size
      log.info('downloading: %d kB', size // 1000)
  if failed.is_set():
    return None
  raw = b''.join(chunks)
  log.info('downloaded %d bytes', len(raw))
  return raw


def _pydoc_topics() -> str:
  """Returns the reference texts that CPython contains, 0.5M characters."""
  topics = importlib.import_module('pydoc_data.topics').topics
  return '\n'.join(topics[name] for name in sorted(topics))


EMBEDDED: dict[str, Callable[[], str]] = {'pydoc_data.topics': _pydoc_topics}
