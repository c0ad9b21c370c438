"""Where the text comes from, in what order, and what is no text."""

import contextlib
import hashlib
import http.server
import logging
import os
import pydoc_data.topics
import socket
import socketserver
import threading
import time

import pytest

from nanomoe.data import corpus as corpus_lib
from trainers.errors import UserError

TEXT = 'First Citizen:\nBefore we proceed, hear me speak. ' * 50
RAW = TEXT.encode()
FALLBACK = 'pydoc_data.topics'


def sha256(raw):
  return hashlib.sha256(raw).hexdigest()


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
  """Empty directories, a network that refuses, and TEXT as the one wanted."""
  for name in list(os.environ):
    if name.lower().endswith('_proxy'):
      monkeypatch.delenv(name)
  monkeypatch.setenv('no_proxy', '*')
  monkeypatch.setenv('NANOMOE_DATA_DIR', str(tmp_path / 'data'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(corpus_lib, 'SHA256', sha256(RAW))
  monkeypatch.setattr(corpus_lib, 'GIVE_UP_SECONDS', 5)
  with socket.socket() as unused:  # Nobody listens there.
    unused.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{unused.getsockname()[1]}/'
  monkeypatch.setattr(corpus_lib, 'URL', url)
  return tmp_path


@pytest.fixture
def warnings(caplog):
  """warnings() -> what was warned of."""
  logger = logging.getLogger('nanomoe.data.corpus')
  logger.addHandler(caplog.handler)

  def messages():
    return {
      r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING
    }

  yield messages
  logger.removeHandler(caplog.handler)


@contextlib.contextmanager
def serving(handler):
  server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), handler)
  server.daemon_threads = True
  server.block_on_close = False
  thread = threading.Thread(target=server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_address[1]}/input.txt'
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def serve(monkeypatch):
  """serve(raw, ...) makes `URL` answer so; returns the list of its requests."""
  with contextlib.ExitStack() as stack:

    def start(raw, status=200, length=None):
      requests = []

      class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
          requests.append(self.path)
          self.send_response(status)
          self.send_header('Content-Length', str(length or len(raw)))
          self.end_headers()
          self.wfile.write(raw)

        def log_message(self, *arguments):
          pass

      url = stack.enter_context(serving(Handler))
      monkeypatch.setattr(corpus_lib, 'URL', url)
      return requests

    yield start


def put(directory, raw=RAW):
  directory.mkdir(parents=True, exist_ok=True)
  (directory / corpus_lib.FILE).write_bytes(raw)


def wanted():
  return corpus_lib.Corpus(corpus_lib.NAME, TEXT, sha256(RAW))


# In what order.


def test_the_data_directory_is_first(world, serve, warnings):
  requests = serve(RAW)
  put(world / 'data')
  put(world / 'cache' / 'nanomoe', b'not even looked at')
  assert corpus_lib.find('', '') == wanted()
  assert requests == []
  assert not warnings()


def test_the_cache_is_second(world, serve, monkeypatch):
  requests = serve(RAW)
  put(world / 'cache' / 'nanomoe')
  assert corpus_lib.find('', '') == wanted()
  monkeypatch.delenv('NANOMOE_DATA_DIR')
  assert corpus_lib.find('', '') == wanted()
  assert requests == []


def test_the_cache_is_in_the_home_directory_by_default(world, monkeypatch):
  monkeypatch.setenv('HOME', str(world / 'home'))
  monkeypatch.delenv('XDG_CACHE_HOME')
  put(world / 'home' / '.cache' / 'nanomoe')
  assert corpus_lib.find('', '') == wanted()


def test_a_download_is_third_and_is_kept(world, serve, warnings):
  requests = serve(RAW)
  assert corpus_lib.find('', FALLBACK) == wanted()
  assert corpus_lib.find('', FALLBACK) == wanted()
  assert len(requests) == 1
  (kept,) = (world / 'cache' / 'nanomoe').iterdir()  # And no temporary file.
  assert kept.name == corpus_lib.FILE
  assert kept.read_bytes() == RAW
  assert not (world / 'data').exists()
  assert not warnings()


def test_a_download_that_cannot_be_kept_is_used(world, serve, monkeypatch):
  serve(RAW)
  (world / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(world / 'file'))
  assert corpus_lib.find('', '') == wanted()


def test_the_fallback_is_last_and_loud(warnings):
  topics = pydoc_data.topics.topics
  corpus = corpus_lib.find('', FALLBACK)
  assert corpus.name == FALLBACK
  assert corpus.fingerprint == sha256(corpus.text.encode())
  assert len(corpus.text) > 300_000
  assert all(topic in corpus.text for topic in topics.values())
  assert any(FALLBACK in line and 'INSTEAD' in line for line in warnings())
  assert corpus_lib.find('', FALLBACK) == corpus  # The same text every time.


def test_without_a_fallback_it_is_an_error_that_says_what_to_do(world):
  with pytest.raises(UserError) as error:
    corpus_lib.find('', '')
  (line,) = error.value.problems
  assert str(world / 'cache' / 'nanomoe') in line
  for way in ('NANOMOE_DATA_DIR', '--config.data.path', corpus_lib.FILE):
    assert way in line


def test_a_copy_that_is_another_text_is_not_used(world, serve, warnings):
  put(world / 'data', RAW + b'!')
  put(world / 'cache' / 'nanomoe', b'')
  assert corpus_lib.find('', FALLBACK).name == FALLBACK
  for place in (world / 'data', world / 'cache' / 'nanomoe'):
    assert any(str(place / corpus_lib.FILE) in w for w in warnings())
  serve(RAW)
  assert corpus_lib.find('', FALLBACK) == wanted()
  # The user's own directory is left as it is.
  assert (world / 'data' / corpus_lib.FILE).read_bytes() == RAW + b'!'


# A network that fails.


def test_a_download_of_another_text_is_neither_used_nor_kept(
  world, serve, warnings
):
  requests = serve(RAW[:-1] + b'?')
  assert corpus_lib.find('', FALLBACK).name == FALLBACK
  assert len(requests) == 1
  assert any(corpus_lib.URL in line for line in warnings())
  assert not (world / 'cache').exists()


@pytest.mark.parametrize(
  'raw, answer',
  [
    (RAW, dict(status=404)),
    (RAW, dict(status=503)),
    (RAW[:-10], dict(length=len(RAW))),
  ],
)
def test_an_answer_that_is_an_error_or_cut_short(world, serve, raw, answer):
  requests = serve(raw, **answer)
  started = time.monotonic()
  with pytest.raises(UserError):
    corpus_lib.find('', '')
  assert requests
  assert time.monotonic() - started < 4  # It is not waited for.
  assert not (world / 'cache').exists()


@pytest.mark.filterwarnings(
  'error::pytest.PytestUnhandledThreadExceptionWarning'
)
def test_an_answer_that_is_no_http(monkeypatch):
  class Handler(socketserver.BaseRequestHandler):
    def handle(self):
      self.request.recv(1000)
      self.request.sendall(b'+OK, this is a mail server\r\n\r\n')

  with serving(Handler) as url:
    monkeypatch.setattr(corpus_lib, 'URL', url)
    started = time.monotonic()
    with pytest.raises(UserError):
      corpus_lib.find('', '')
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
  'said', [b'', b'HTTP/1.0 200 OK\r\n\r\nFirst Citizen:'], ids=['all', 'rest']
)
def test_a_server_that_hangs_is_given_up(monkeypatch, said):
  over = threading.Event()

  class Handler(socketserver.BaseRequestHandler):
    def handle(self):
      self.request.sendall(said)
      over.wait(20)

  monkeypatch.setattr(corpus_lib, 'GIVE_UP_SECONDS', 0.4)
  with serving(Handler) as url:
    monkeypatch.setattr(corpus_lib, 'URL', url)
    started = time.monotonic()
    assert corpus_lib.find('', FALLBACK).name == FALLBACK
    seconds = time.monotonic() - started
    over.set()
  assert 0.3 < seconds < 5


@pytest.mark.slow
def test_a_server_that_is_slow_is_not_given_up(monkeypatch):
  """2.6 s in all, of which no 2 s without a byte."""

  class Handler(socketserver.BaseRequestHandler):
    def handle(self):
      self.request.sendall(b'HTTP/1.0 200 OK\r\n\r\n')
      for start in range(0, len(RAW), 200):
        self.request.sendall(RAW[start : start + 200])
        time.sleep(0.2)

  assert len(RAW) > 12 * 200
  monkeypatch.setattr(corpus_lib, 'GIVE_UP_SECONDS', 2.0)
  with serving(Handler) as url:
    monkeypatch.setattr(corpus_lib, 'URL', url)
    assert corpus_lib.find('', FALLBACK) == wanted()


# A path.


def test_a_path_is_the_text_and_nothing_is_changed(world):
  raw = 'a\r\nb\rc\n\n \ufeff★'.encode()
  path = world / 'mine.txt'
  path.write_bytes(raw)
  corpus = corpus_lib.find(str(path), FALLBACK)
  assert corpus == ('mine.txt', raw.decode(), sha256(raw))
  assert '\r\n' in corpus.text


def refused(path):
  """The one line, where everything else could be had."""
  with pytest.raises(UserError) as error:
    corpus_lib.find(str(path), FALLBACK)
  (line,) = error.value.problems
  assert str(path) in line
  assert 'data.path' in line
  return line


def test_a_path_never_falls_back(world, serve):
  requests = serve(RAW)
  put(world / 'data')
  empty = world / 'empty.txt'
  empty.touch()
  pipe = world / 'pipe'
  os.mkfifo(pipe)
  dangling = world / 'dangling'
  dangling.symlink_to(world / 'nowhere')
  (world / 'plain').write_text('x')
  assert 'no such file' in refused(world / 'nowhere.txt')
  assert 'no such file' in refused(dangling)
  refused(world / 'plain' / 'below')
  assert 'empty' in refused(empty)
  assert 'directory' in refused(world)
  assert 'regular' in refused(pipe)  # Reading it would never end.
  assert requests == []


@pytest.mark.parametrize(
  'raw, position, byte',
  [
    (b'a' * 54321 + b'\xff\xfe', 54321, '0xff'),
    ('é'.encode() * 30000 + b'\xc3', 60000, '0xc3'),  # Cut in a character.
    ('\r\n'.join(['x'] * 20000).encode('utf-16'), 0, '0xff'),
  ],
)
def test_what_is_not_utf_8_is_told_with_its_position(
  world, raw, position, byte
):
  path = world / 'latin.txt'
  path.write_bytes(raw)
  line = refused(path)
  assert f'byte {position} ' in line
  assert byte in line


def test_a_path_that_no_file_can_have(world):
  refused(world / ('x' * 300))


def test_without_a_home_the_given_directory_serves(world, monkeypatch):
  (world / 'data').mkdir()
  (world / 'data' / corpus_lib.FILE).write_bytes(RAW)
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)  # No home.
  assert corpus_lib.find('', '').text == TEXT
  (world / 'data' / corpus_lib.FILE).unlink()
  with pytest.raises(UserError, match='XDG_CACHE_HOME'):
    corpus_lib.find('', '')
