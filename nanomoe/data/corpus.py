"""Where the training text comes from."""

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
MARK = '\ufeff'  # The byte order mark of UTF-8 is this character.
GIVE_UP_SECONDS = 10
IN_MEMORY_BYTES = 1 << 25  # Of a larger text, only its tokens are mapped.
PROGRESS_BYTES = 200_000  # Between two lines of progress.


class Corpus(NamedTuple):
  """A text, what it is called, and its SHA-256 in hexadecimal."""

  name: str
  text: str | LargeText
  fingerprint: str


def find(path: str, fallback: str, recorded: str = '') -> Corpus:
  """The text at `path`; without one, Tiny Shakespeare, or `fallback`.

  Tiny Shakespeare is looked for in $NANOMOE_DATA_DIR, in the user's cache
  directory, and on the network, in this order.

  Args:
    path: of a UTF-8 text; given, nothing else is ever used.
    fallback: a name in `EMBEDDED`, used with a warning; '' allows none.
    recorded: as of `read`.

  Raises:
    UserError: there is no text, or it is none.
  """
  if path:
    return read(path, recorded=recorded)
  raw = _local_copy() or _downloaded()
  if raw:
    return Corpus(NAME, raw.decode(), SHA256)
  where = (
    f'Tiny Shakespeare could not be had: there is no intact {FILE} in '
    f'$NANOMOE_DATA_DIR or in {cache.directory()}, and no network'
  )
  if not fallback:
    raise UserError(
      f'data.path: {where}; put the file into one of these, or name a text '
      'with --config.data.path=FILE'
    )
  log.warning('WARNING: %s.', where)
  log.warning('WARNING: training on %s INSTEAD of Tiny Shakespeare.', fallback)
  text = EMBEDDED[fallback]()
  return Corpus(fallback, text, _sha256(text.encode()))


def find_again(path: str, name: str, sha256: str) -> Corpus:
  """The text that a run was trained on, at `path` or where it was found.

  Raises:
    UserError: it cannot be had, or it has changed.
  """
  if not path and name in EMBEDDED:
    text = EMBEDDED[name]()
    corpus = Corpus(name, text, _sha256(text.encode()))
  else:
    corpus = find(path, fallback='', recorded=sha256)
  if corpus.fingerprint != sha256:
    raise UserError(
      f'the text has changed: this run is on {name} (sha256 {sha256[:16]}), '
      f'and {corpus.name} is now {corpus.fingerprint[:16]}; training goes on '
      'all the same with --allow_changed=data'
    )
  return corpus


def path_problems(path: str, key: str = 'data.path') -> list[str]:
  """What is wrong with the file at `path`, which `key` names; reads nothing."""
  try:
    status = os.stat(path)
  except (OSError, ValueError) as error:
    reason = str(getattr(error, 'strerror', error)).lower()
    return [f'{key}={path!r}: {reason}']
  if not stat.S_ISREG(status.st_mode):  # Reading a FIFO would wait for ever.
    directory = stat.S_ISDIR(status.st_mode)
    kind = 'a directory' if directory else 'not a regular file'
    return [f'{key}={path!r} is {kind}; it must be a text file']
  if not status.st_size:
    return [f'{key}={path!r} is empty']
  return []


def read(path: str, key: str = 'data.path', recorded: str = '') -> Corpus:
  """Returns the text at `path` without a byte order mark (U+FEFF) at its start.

  Args:
    path: path of the file.
    key: flag or config key that gave `path`, for errors.
    recorded: SHA-256 of the text that the run began with. An older version kept
      the mark as a token: if this is the hash of the whole file, it stays.

  Raises:
    UserError: there is no such file, or it is no UTF-8 text.
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
  """Drops the mark; the fingerprint is that of the text that is left."""
  text = corpus.text[1:]
  if not len(text):
    raise UserError(f'{where} is empty but for a byte order mark')
  log.info('%s begins with a byte order mark, which is dropped', where)
  digest = hashlib.sha256()
  for piece in large_text.pieces(text):
    digest.update(piece.encode())
  return Corpus(corpus.name, text, digest.hexdigest())


def _sha256(raw: bytes) -> str:
  return hashlib.sha256(raw).hexdigest()


def _local_copy() -> bytes | None:
  for place in _places():
    try:
      raw = (place / FILE).read_bytes()
    except OSError:
      continue
    if _sha256(raw) == SHA256:
      return raw
    log.warning(
      'WARNING: %s is not Tiny Shakespeare (its SHA-256 differs) and is not '
      'used; to train on it, give --config.data.path',
      place / FILE,
    )
  return None


def _places() -> Iterator[pathlib.Path]:
  if place := home.variable('NANOMOE_DATA_DIR'):
    yield pathlib.Path(place)
  yield cache.directory()


def _downloaded() -> bytes | None:
  """From `URL` into the cache directory; None if it cannot be had."""
  log.info('downloading %s', URL)
  raw = _download(URL)
  if raw is None:
    return None
  if _sha256(raw) != SHA256:
    log.warning('WARNING: %s is not what it was (its SHA-256 differs)', URL)
    return None
  target = cache.directory() / FILE
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, raw.decode())
  except OSError as error:  # A cache is a convenience: the bytes are here.
    log.warning('%s could not be written: %s', target, error)
  return raw


def _download(url: str) -> bytes | None:
  """None once nothing has arrived for `GIVE_UP_SECONDS`.

  In a thread of its own: looking up a name has no timeout.
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
      log.info('no download: %s', error)
      failed.set()
    done.set()

  threading.Thread(target=read, daemon=True).start()
  told = 0
  while not done.wait(0.1):
    if time.monotonic() - arrived[0] > GIVE_UP_SECONDS:
      log.info('no download: nothing came for %d s', GIVE_UP_SECONDS)
      return None
    if (size := sum(map(len, chunks))) - told > PROGRESS_BYTES:
      told = size
      log.info('downloading: %d kB', size // 1000)
  if failed.is_set():
    return None
  raw = b''.join(chunks)
  log.info('downloaded %d bytes', len(raw))
  return raw


def _pydoc_topics() -> str:
  """The reference texts that every CPython carries: 0.5M characters."""
  topics = importlib.import_module('pydoc_data.topics').topics
  return '\n'.join(topics[name] for name in sorted(topics))


EMBEDDED: dict[str, Callable[[], str]] = {'pydoc_data.topics': _pydoc_topics}
