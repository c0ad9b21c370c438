"""Texts, prompts, directories and files of a run as nobody meant them."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from configs import base
from faults.conftest import MAIN, fault
from nanomoe import generate
from nanomoe import main as main_lib
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import large_text, tokenizers
from nanomoe.data import pipeline as text_lib
from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.data.tokenizers import Bytes, Characters
from nanomoe.data.windows import Windows
from nanomoe.run import workdir
from tests.runs import metrics_of, result_of
from tests.shrunk import ROOT
from trainers.errors import UserError
from trainers.files import write_atomically


def case(what, *values):
  return pytest.param(*values, marks=fault(what, ONE_LINE), id=what)


ONE_LINE = 'one line, exit code 2; no run is begun'


def one_line(call, *args, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  (line,) = error.value.problems
  assert '\n' not in line
  return line


# A text.


@pytest.mark.parametrize(
  ('make', 'part'),
  [
    case('no text', lambda path: None, 'no such file'),
    case('an empty text', lambda path: path.touch(), 'is empty'),
    case('a directory', lambda path: path.mkdir(), 'is a directory'),
    case('a FIFO', os.mkfifo, 'not a regular file'),
    case('a device', lambda p: p.symlink_to('/dev/zero'), 'not a regular file'),
    case('a link to itself', lambda path: path.symlink_to(path), 'symbolic'),
  ],
)
def test_what_is_no_text(tmp_path, happened, make, part):
  """Found by a process within a second: JAX is not even imported."""
  path = tmp_path / 'text.txt'
  make(path)
  process = subprocess.run(
    [
      *MAIN,
      '--config=configs/base.py',
      f'--config.data.path={path}',
      f'--workdir={tmp_path / "run"}',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert process.returncode == 2
  (line,) = process.stderr.splitlines()
  assert part in line
  assert not (tmp_path / 'run').exists()
  happened(line.replace(str(tmp_path), '...'))


NOT_UTF8 = [
  (b'a' * 70_000 + b'\x80', 70_000, '0x80'),
  ('é'.encode() * 40_000 + b'\xc3', 80_000, '0xc3'),
  (b'\xff\xfea\x00', 0, '0xff'),
]


@pytest.mark.parametrize(
  ('raw', 'at', 'byte'),
  [
    case(f'a text that is not UTF-8 at byte {at}', raw, at, byte)
    for raw, at, byte in NOT_UTF8
  ],
)
@pytest.mark.parametrize('in_memory', [True, False])
def test_not_utf8(tmp_path, monkeypatch, happened, raw, at, byte, in_memory):
  """The same line whether it is read whole or in pieces."""
  if not in_memory:
    monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
    monkeypatch.setattr(large_text, 'PIECE_BYTES', 997)
  path = tmp_path / 'text.txt'
  path.write_bytes(raw)
  line = one_line(corpus_lib.read, str(path))
  assert f'data.path={str(path)!r}' in line
  assert f'byte {at} is {byte}' in line
  happened(line.replace(str(tmp_path), '...'))


@fault('a text that is shorter than a window', ONE_LINE)
def test_a_short_text(tiny, tmp_path, happened):
  path = tmp_path / 'text.txt'
  path.write_text('ab\n' * 30)
  line = one_line(text_lib.read, tiny({'data.path': path}), tmp_path)
  for words in (
    f'data.path={str(path)!r}',
    'val',
    '9 of the 17',
    'block_size=16',
  ):
    assert words in line
  happened(line.replace(str(tmp_path), '...'))


@fault('a text with Windows line endings', 'they are kept, to the last byte')
@pytest.mark.parametrize('kind', tokenizers.TOKENIZERS)
@pytest.mark.parametrize('in_memory', [True, False])
def test_line_endings(tmp_path, monkeypatch, happened, kind, in_memory):
  if not in_memory:
    monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(large_text, 'PIECE_BYTES', 100)
  # The mark of the first is dropped; one inside the text is a character.
  raw = 'one\r\ntwo\rthree\n\r\n★ \ufeff'.encode() * 40
  path = tmp_path / 'text.txt'
  path.write_bytes(raw)
  corpus = corpus_lib.read(str(path))
  splits = text_lib.split(corpus.text)
  tokenizer = tokenizers.build({'type': kind})
  tokenizer.fit(splits)
  tokens = text_lib.tokenize(splits, tokenizer, corpus.fingerprint)
  text = ''.join(tokenizer.decode(tokens[name]) for name in ('train', 'val'))
  assert text.encode() == raw
  # As a sample keeps them.
  write_atomically(tmp_path / 'sample.txt', text)
  assert (tmp_path / 'sample.txt').read_bytes() == raw
  happened('equal, byte by byte')


@contextlib.contextmanager
def edited_at_call(monkeypatch, number, edit):
  """edit() comes just before the status of a file is asked for that time."""
  real, calls = large_text._status, []

  def status(file):
    calls.append(file)
    if len(calls) == number:
      edit()
    return real(file)

  with monkeypatch.context() as patch:
    patch.setattr(large_text, '_status', status)
    yield


@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize(
  'edit',
  [
    case('a text that grows while it is read', lambda p: append(p, 'more')),
    case(
      'a text that is overwritten while it is read',
      lambda p: p.write_text('b' * 1000),
    ),
    case('a text that is cut while it is read', lambda p: os.truncate(p, 500)),
  ],
)
def test_a_text_that_changes(tmp_path, monkeypatch, happened, edit, in_memory):
  path = tmp_path / 'text.txt'
  path.write_text('a' * 1000)
  if not in_memory:
    monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
  with edited_at_call(monkeypatch, 2, lambda: edit(path)):
    line = one_line(corpus_lib.read, str(path))
  assert f'data.path={str(path)!r}' in line
  assert 'changed' in line
  happened(line.replace(str(tmp_path), '...'))


def append(path, text):
  with path.open('a') as file:
    file.write(text)


@fault(
  'a large text that changes after it was hashed, before it is tokenized',
  'one line; no tokens of it are kept',
)
def test_a_large_text_that_changes_later(tmp_path, monkeypatch, happened):
  monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  path = tmp_path / 'text.txt'
  path.write_text('abcdefgh\n' * 1000)
  corpus = corpus_lib.read(str(path))
  splits = text_lib.split(corpus.text)
  tokenizer = Bytes()
  path.write_text('hgfedcba\n' * 1000)
  line = one_line(text_lib.tokenize, splits, tokenizer, corpus.fingerprint)
  assert f'data.path={str(path)!r}' in line
  assert 'changed' in line
  assert not list((tmp_path / 'cache').rglob('*.bin'))
  happened(line.replace(str(tmp_path), '...'))


# Tokens beyond the vocabulary.


class Wild(Bytes):
  """A byte more than it says."""

  def encode(self, text):
    return np.array([ord(c) + 1 for c in text], np.int32)


@fault(
  "a plug-in's tokenizer that makes a token beyond its vocabulary",
  'one line: XLA would clamp it, and train on another text',
)
def test_a_token_of_a_tokenizer(happened):
  tokens = text_lib.tokenize({'train': 'abc'}, Wild(), 'x')
  assert tokens['train'].tolist() == [98, 99, 100]
  line = one_line(text_lib.tokenize, {'train': 'a\xff'}, Wild(), 'x')
  assert 'data.tokenizer' in line
  assert 'token 256' in line
  assert '0 to 255' in line
  happened(line)


@pytest.mark.parametrize(
  ('name', 'token'),
  [
    pytest.param(
      name,
      token,
      marks=fault(
        f"a plug-in's dataset with token {token} of 20 in {name}",
        'one line, when the batch is asked for',
      ),
    )
    for name, token in [('inputs', 20), ('targets', -1)]
  ],
)
def test_a_token_of_a_dataset(happened, name, token):
  class Strange(Windows):
    def _random_batch(self, *args):
      batch = super()._random_batch(*args)
      changed = batch[name].copy()  # Inputs and targets share their memory.
      changed[1, 2] = token
      return {**batch, name: changed}

  splits = {k: np.arange(20, dtype=np.int32) for k in ('train', 'val')}
  sizes = {'seed': 0, 'batch_size': 4, 'block_size': 8, 'eval_iters': 1}
  good = text_lib.InVocabulary(Windows(splits, **sizes), 20)
  assert good.train_batch(0, slice(0, 4))['inputs'].shape == (4, 8)
  assert good.block_size == 8  # All else is the dataset's.
  bad = text_lib.InVocabulary(Strange(splits, **sizes), 20)
  line = one_line(bad.train_batch, 0, slice(0, 4))
  assert f'data.dataset: batch[{name!r}]' in line
  assert f'token {token}' in line
  assert '0 to 19' in line
  assert line == one_line(lambda: list(bad.eval_batches('val', slice(0, 4))))
  happened(line)


# Large texts.


@pytest.fixture
def in_pieces(monkeypatch, tmp_path):
  monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
  monkeypatch.setattr(large_text, 'PIECE_BYTES', 7)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache' / 'nanomoe'


_texts = st.text(
  st.sampled_from(list('ab \n\té★😀.')) | st.characters(codec='utf-8'),
  min_size=1,
  max_size=60,
)


@settings(deadline=None, max_examples=80, derandomize=True, database=None)
@given(_texts, st.integers(0, 70), st.integers(0, 70))
def test_a_large_text_is_as_the_str(text, i, j):
  """Its length, its slices, its characters; and its pieces are it again."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(large_text, 'PIECE_BYTES', 5)
    with tempfile.TemporaryDirectory() as directory:
      path = pathlib.Path(directory, 'text.txt')
      path.write_bytes(text.encode())
      whole, _ = large_text.scan(path, 'x')
      part = whole[i:j]
      for found, wanted in [
        (whole, text),
        (part, text[i:j]),
        (part[1:], text[i:j][1:]),
      ]:
        assert len(found) == len(wanted)
        assert str(found) == wanted
        assert list(found) == list(wanted)
        assert ''.join(found.pieces()) == wanted


@pytest.mark.parametrize('kind', [Characters, Bytes, lambda: BPE(300)])
def test_tokens_of_pieces_are_those_of_the_whole(tmp_path, in_pieces, kind):
  rng = np.random.default_rng(0)
  words = ['the', ' cat', ' théâtre', '\n', '\r\n\r\n', '  ', "'s", '★', '.']
  text = ''.join(rng.choice(words, 3000))
  path = tmp_path / 'text.txt'
  path.write_bytes(text.encode())
  corpus = corpus_lib.read(str(path))
  assert isinstance(corpus.text, large_text.LargeText)
  assert corpus.fingerprint == corpus_lib._sha256(text.encode())
  tokenizer, other = kind(), kind()
  tokenizer.fit(text_lib.split(corpus.text))
  other.fit(text_lib.split(text))
  tokens = text_lib.tokenize(
    text_lib.split(corpus.text), tokenizer, corpus.fingerprint
  )
  wanted = text_lib.tokenize(text_lib.split(text), other, 'x')
  sizes = {'seed': 0, 'batch_size': 4, 'block_size': 16, 'eval_iters': 0}
  of_pieces, of_whole = Windows(tokens, **sizes), Windows(wanted, **sizes)
  if kind in (Characters, Bytes):  # BPE is learned from pieces, too.
    assert of_pieces.fingerprint == of_whole.fingerprint
    for a, b in zip(
      [
        of_pieces.train_batch(3, slice(0, 4)),
        *of_pieces.eval_batches('val', slice(0, 4)),
      ],
      [
        of_whole.train_batch(3, slice(0, 4)),
        *of_whole.eval_batches('val', slice(0, 4)),
      ],
      strict=True,
    ):
      assert all(np.array_equal(a[k], b[k]) for k in a)
      assert a['inputs'].dtype == np.int32
  for name, part in text_lib.split(text).items():
    np.testing.assert_array_equal(tokens[name], tokenizer.encode(part))
  assert isinstance(tokens['train'], np.memmap)
  assert tokens['train'].dtype == (
    np.uint8 if tokenizer.vocab_size <= 256 else np.uint16
  )


def test_tokens_are_made_once(tmp_path, in_pieces):
  """Found by what they are of: neither a tokenizer nor a split is mixed up."""
  path = tmp_path / 'text.txt'
  path.write_text('abc é\n' * 500)
  made = []

  class Counts(Bytes):
    def encode(self, text):
      made.append(text)
      return super().encode(text)

  def tokens(tokenizer=None, share=2000):
    corpus = corpus_lib.read(str(path))
    splits = {'train': corpus.text[:share], 'val': corpus.text[share:]}
    made.clear()
    found = text_lib.tokenize(splits, tokenizer or Counts(), corpus.fingerprint)
    return {k: v.tobytes() for k, v in found.items()}, len(made)

  first, many = tokens()
  again, few = tokens()
  assert again == first
  assert few == 2 < many  # The beginning of each split, to know it by.
  assert [p.suffix for p in in_pieces.iterdir()] == ['.bin']
  assert tokens(share=1000)[0] != first

  class Shifted(Bytes):
    def encode(self, text):
      return super().encode(text)[::-1]

  assert tokens(Shifted())[0] != first
  path.write_text('abc é\n' * 501)
  assert tokens()[0] != first


@pytest.mark.parametrize(
  'spoil',
  [
    pytest.param(spoil, marks=fault(what, 'they are made anew'), id=what)
    for what, spoil in [
      ('kept tokens that were cut', lambda p: os.truncate(p, 100)),
      ('kept tokens that were emptied', lambda p: os.truncate(p, 0)),
      ('kept tokens that were removed', lambda p: p.unlink()),
    ]
  ],
)
def test_kept_tokens_that_are_damaged(tmp_path, in_pieces, happened, spoil):
  path = tmp_path / 'text.txt'
  path.write_text('abc é\n' * 500)
  corpus = corpus_lib.read(str(path))
  splits = text_lib.split(corpus.text)

  def tokens():
    found = text_lib.tokenize(splits, Bytes(), corpus.fingerprint)
    return {k: v.tobytes() for k, v in found.items()}

  first = tokens()
  (kept,) = in_pieces.glob('*.bin')
  spoil(kept)
  assert tokens() == first
  happened('equal tokens')


@fault(
  'kill -9 while a large text is tokenized',
  'what it left is removed by the next; one that is at work is left alone',
)
def test_abandoned_tokens(tmp_path, in_pieces, happened):
  in_pieces.mkdir(parents=True)
  dead, alive = (in_pieces / f'.tokens-{n}.tmp' for n in ('dead', 'alive'))
  dead.write_bytes(b'x' * 100)
  alive.touch()
  path = tmp_path / 'text.txt'
  path.write_text('abc\n' * 500)
  corpus = corpus_lib.read(str(path))
  with alive.open() as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    text_lib.tokenize(text_lib.split(corpus.text), Bytes(), corpus.fingerprint)
  assert not dead.exists()
  assert alive.exists()
  assert len(list(in_pieces.glob('*.bin'))) == 1
  happened('removed; the other is there')


@fault(
  'no place for the tokens of a large text',
  'one line that names the directory and how to choose another',
)
def test_no_place_for_tokens(tmp_path, in_pieces, happened):
  in_pieces.parent.write_text('in the way')
  path = tmp_path / 'text.txt'
  path.write_text('abc\n' * 500)
  corpus = corpus_lib.read(str(path))
  splits = text_lib.split(corpus.text)
  line = one_line(text_lib.tokenize, splits, Bytes(), corpus.fingerprint)
  assert str(in_pieces) in line
  assert 'XDG_CACHE_HOME' in line
  happened(line.replace(str(tmp_path), '...'))


@fault('a character without a token deep in a large text', 'it is named')
def test_a_character_without_a_token(tmp_path, in_pieces, happened):
  path = tmp_path / 'text.txt'
  path.write_text('abc\n' * 500 + 'abZ\n')
  corpus = corpus_lib.read(str(path))
  tokenizer = Characters()
  tokenizer.fit({'train': 'abc\n'})
  line = one_line(
    text_lib.tokenize, {'train': corpus.text}, tokenizer, corpus.fingerprint
  )
  assert "'Z'" in line
  assert 'after character 1,999' in line
  happened(line)


def test_a_plug_in_s_tokenizer_fits_a_str_of_any_text(
  tiny, tmp_path, in_pieces
):
  class Plain(Tokenizer):
    vocab_size = 256

    def fit(self, texts):
      assert all(type(text) is str for text in texts.values())

    def encode(self, text):
      return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens):
      return bytes(int(t) for t in tokens).decode(errors='replace')

  module = sys.modules[__name__]
  module.Plain = Plain
  config = tiny({'data.tokenizer.type': f'{__name__}.Plain'})
  corpus, _, dataset = text_lib.read(config, tmp_path)
  assert isinstance(corpus.text, large_text.LargeText)
  assert dataset.train_batch(0, slice(0, 4))['inputs'].shape == (4, 16)


BOUNDED = """
import os, pathlib, resource, sys
from nanomoe.data import corpus, tokenizers
from nanomoe.data import pipeline as text
from nanomoe.data.windows import Windows

def megabytes(name):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(x.split()[1]) for x in lines if x.startswith(name)) / 1024

path, kind, allowed = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = megabytes('VmData')
limit = int((before + allowed) * 2**20)
# Of what is written to: not of a file that is mapped.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
found = corpus.read(path)
tokenizer = tokenizers.build({'type': kind})
tokenizer.fit(text.split(found.text))
tokens = text.tokenize(text.split(found.text), tokenizer, found.fingerprint)
data = Windows(tokens, seed=0, batch_size=32, block_size=128, eval_iters=0)
for index in range(20):
  data.train_batch(index, slice(0, 32))
next(data.eval_batches('val', slice(0, 32)))
size = os.path.getsize(path) / 2**20
more = megabytes('VmData') - before
print(f'{size:.0f} MB of text: {more:.0f} MB of memory; {len(tokens["train"])}')
"""


def bounded(path, kind, megabytes, cache):
  process = subprocess.run(
    [sys.executable, '-c', BOUNDED, str(path), kind, str(megabytes)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    env={**os.environ, 'XDG_CACHE_HOME': str(cache)},
  )
  assert process.returncode == 0, process.stderr[-2000:]
  return process.stdout.strip()


@fault(
  'a text of 40 MB, and 30 MB of memory beside what Python has',
  'read, tokenized and cut into batches',
)
def test_a_large_text_needs_little_memory(tmp_path, happened):
  path = tmp_path / 'text.txt'
  with path.open('wb') as file:
    for _ in range(40):
      file.write('to be, or not to be: thé question\r\n'.encode() * 28_800)
  happened(bounded(path, 'Characters', 30, tmp_path / 'cache').split(';')[0])


@fault(
  'a text of 1 GB (most of it a hole), and 30 MB of memory',
  'read, tokenized and cut into batches',
)
@pytest.mark.slow
def test_a_larger_text_needs_no_more(tmp_path, happened):
  path = tmp_path / 'text.txt'
  path.write_text('the end of the beginning, and after it a hole. ' * 100)
  os.truncate(path, 1_000_000_000)
  happened(bounded(path, 'Bytes', 30, tmp_path / 'cache').split(';')[0])


@fault(
  'a text of 40 MB, by the main command: trained, killed, resumed, evaluated',
  'as any other text; its tokens are made once',
)
@pytest.mark.slow
def test_a_run_on_a_large_text(tmp_path, start, run, happened):
  path = tmp_path / 'text.txt'
  path.write_bytes(b'to be, or not to be: that is the question\r\n' * 900_000)
  env = {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  changes = {'data.path': path, 'num_train_steps': 4}
  directory = tmp_path / 'run'
  first = start(directory, changes=changes, env=env)
  assert first.end() == 0, first.output
  assert 'tokenizing' in first.output
  (kept,) = (tmp_path / 'cache' / 'nanomoe').glob('*.bin')
  assert kept.stat().st_size == 900_000 * 43
  again = start(directory, '--config.num_train_steps=6', new=False, env=env)
  assert again.end() == 0, again.output
  assert 'tokenizing' not in again.output
  process = run(
    [
      *(sys.executable, '-m', 'nanomoe.evaluate', f'--workdir={directory}'),
      f'--data={ROOT / "README.md"}',
    ],
    env={**os.environ, **env},
  )
  assert process.returncode == 2  # It has characters that the text has not.
  assert 'is not in the vocabulary' in process.stderr
  happened('trained 4 steps, went on to 6; 38.7 MB of tokens')


# Prompts.


@pytest.fixture
def untrained(tmp_path):
  """A directory with a config and no checkpoint."""
  workdir.write_json(tmp_path / 'config.json', base.get_config().to_dict())
  return tmp_path


@pytest.mark.parametrize(
  ('prompt', 'part'),
  [
    case('an empty prompt', '', "--prompt=''"),
    case('a prompt that is not UTF-8', 'a\udcff', 'not UTF-8'),
  ],
)
def test_a_prompt_that_is_none(untrained, happened, prompt, part):
  line = one_line(generate.generate, untrained, [prompt])
  assert part in line
  happened(line)


@fault(
  'a prompt outside a vocabulary of 3,000 characters',
  'one line, with the character and its place; not with all 3,000',
)
def test_a_prompt_outside_the_vocabulary(happened):
  tokenizer = Characters()
  tokenizer.fit({'train': ''.join(map(chr, range(0x4E00, 0x4E00 + 3000)))})
  line = one_line(tokenizer.encode, '一Z')
  assert "'Z' at position 1" in line
  assert len(line) < 250
  happened(line)


@fault('any prompt, with the tokenizers of bytes and of BPE', 'it has tokens')
def test_any_prompt_has_bytes(happened):
  bpe = BPE(256)
  bpe.fit({'train': 'abc'})
  for tokenizer in (Bytes(), bpe):
    tokens = tokenizer.encode('漢\x00\r\n😀')
    assert tokenizer.decode(tokens) == '漢\x00\r\n😀'
  happened('given back as it was')


# The files of a run.


VOCABULARIES = [
  ('no JSON', b'{"characters": '),
  ('not UTF-8', b'\xff\xfe'),
  ('a list', b'[]'),
  ('null', b'null'),
  ('deep', b'[' * 100_000),
  ('no characters', {'characters': ''}),
  ('characters twice', {'characters': 'aab'}),
  ('characters as a list', {'characters': ['a', 'b']}),
  ('a lone surrogate', {'characters': 'ab\ud800'}),
  ('another kind', {'tokens': ['a']}),
  ('a corpus that is no text', {'characters': 'ab', 'corpus': 3}),
]


@pytest.mark.parametrize(
  'content',
  [
    pytest.param(
      content,
      marks=fault(f'vocabulary.json: {what}', 'one line: it is damaged'),
      id=what,
    )
    for what, content in VOCABULARIES
  ],
)
def test_a_vocabulary_that_is_none(tmp_path, happened, content):
  path = tmp_path / 'vocabulary.json'
  if isinstance(content, dict):
    known = {'corpus': 'x', 'corpus_sha256': 'y'}
    content = json.dumps({**known, **content}).encode()
  path.write_bytes(content)
  line = one_line(tokenizers.load, {'type': 'Characters'}, path)
  assert f'{path}: ' in line
  assert 'damaged' in line
  happened(line.replace(str(tmp_path), '...')[:140])


CONFIGS = [
  ('no JSON', '{"seed": '),
  ('a list', '[1]'),
  ('empty', ''),
  ('deep', '{"a":' * 50_000),
  ('a key with a dot', '{"a.b": 1}'),
]


@pytest.mark.parametrize(
  'text',
  [
    pytest.param(text, marks=fault(f'config.json: {what}', ONE_LINE), id=what)
    for what, text in CONFIGS
  ],
)
def test_a_config_that_is_none(tmp_path, happened, text):
  (tmp_path / 'config.json').write_text(text)
  main_lib._FLAGS.unparse_flags()
  words = ['main', f'--workdir={tmp_path}', '--config.seed=1']
  line = one_line(lambda: main_lib.requested_config(main_lib._parse(words)))
  assert 'config.json' in line
  happened(line.replace(str(tmp_path), '...')[:140])


@pytest.mark.parametrize(
  ('section', 'value'),
  [
    pytest.param(
      section,
      value,
      marks=fault(f'config.json: {section} is {value!r}', 'a line each'),
    )
    for section, value in [('data', None), ('data', 'x'), ('callbacks', 3)]
  ],
)
def test_a_section_that_is_none(tmp_path, happened, section, value):
  values = {**base.get_config().to_dict(), section: value}
  (tmp_path / 'config.json').write_text(json.dumps(values))
  main_lib._FLAGS.unparse_flags()
  with pytest.raises(UserError) as error:
    main_lib.requested_config(
      main_lib._parse(['main', f'--workdir={tmp_path}'])
    )
  assert all(section in line for line in error.value.problems)
  happened(error.value.problems[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'edit'),
  [
    pytest.param(
      name,
      edit,
      marks=[
        fault(
          f'{name} of a finished run, {what}, and the run made longer',
          'it goes on: nothing reads it',
        ),
        *([] if name == 'metrics.jsonl' else [pytest.mark.full]),
      ],
      id=f'{name}, {what}',
    )
    for what, name, edit in [
      ('nonsense', 'result.json', lambda p: p.write_text('\x00{')),
      ('a directory', 'sample.txt', lambda p: (p.unlink(), p.mkdir())),
      ('nonsense', 'metrics.jsonl', lambda p: p.write_bytes(b'\xff' * 9999)),
    ]
  ],
)
def test_other_files(finished, start, tmp_path, happened, name, edit):
  directory = pathlib.Path(shutil.copytree(finished[0], tmp_path / 'run'))
  edit(directory / name)
  run = start(directory, '--config.num_train_steps=14', new=False)
  assert run.end() == 0, run.output
  assert 'Traceback' not in run.output
  assert result_of(directory)['step'] == 14
  assert metrics_of(directory)[-1]['step'] == 14
  happened('exit code 0, step 14')


# Directories.


@fault(
  "a mistake in a directory that has the user's own log.txt",
  'the directory, and the log, stay',
)
@pytest.mark.slow
def test_nothing_of_the_user_is_removed(tmp_path, start, happened):
  directory = tmp_path / 'run'
  directory.mkdir()
  (directory / 'log.txt').write_text('mine\n')
  run = start(directory, changes={'block_size': 100_000})
  assert run.end() == 2
  assert (directory / 'log.txt').read_text().startswith('mine\n')
  new = start(tmp_path / 'new', changes={'block_size': 100_000})
  assert new.end() == 2
  assert not (tmp_path / 'new').exists()
  happened('exit code 2; log.txt is there; a directory made for it is not')


@pytest.mark.parametrize(
  ('make', 'part'),
  [
    case('a workdir that is a file', lambda p: p.write_text('x'), '--workdir='),
    case('a workdir below a file', lambda p: p.write_text('x'), '--workdir='),
    case('a workdir in /proc', None, '--workdir='),
    case('a workdir in /dev/null', None, '--workdir='),
    case('a workdir with a name of 300 characters', None, 'too long'),
  ],
)
def test_a_workdir_that_cannot_be(request, tmp_path, happened, make, part):
  what = request.node.callspec.id
  path = tmp_path / 'file'
  if make:
    make(path)
  if 'below' in what:
    path /= 'run'
  elif not make:
    path = next(
      place
      for word, place in [
        ('/proc', '/proc/self/nowhere/run'),
        ('/dev/null', '/dev/null/run'),
        ('300', tmp_path / ('x' * 300)),
      ]
      if word in what
    )
  # It is found before the mistake in seed; in /proc, when it is made.
  mistake = [] if '/proc' in what else ['--config.seed=x']
  process = subprocess.run(
    [*MAIN, '--config=configs/base.py', f'--workdir={path}', *mistake],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert process.returncode == 2
  assert 'Traceback' not in process.stderr
  line = next(x for x in process.stderr.splitlines() if part in x)
  happened(
    line.replace(str(tmp_path), '...').replace('x' * 300, 'xxx...')[:140]
  )


@contextlib.contextmanager
def small_disk(path, *options):
  """A file system of its own at `path`; skips where none may be mounted."""
  path.mkdir()
  words = ['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(path)]
  if not shutil.which('mount') or subprocess.run(words).returncode:
    pytest.skip('nothing may be mounted here')
  try:
    yield path
  finally:
    subprocess.run(['umount', '-l', str(path)], check=True)


@fault('a workdir on a disk that is read-only', ONE_LINE)
def test_a_read_only_disk(tmp_path, happened):
  with small_disk(tmp_path / 'disk', 'ro') as disk:
    process = subprocess.run(
      [*MAIN, '--config=configs/base.py', f'--workdir={disk / "run"}'],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=60,
    )
  assert process.returncode == 2
  (line,) = process.stderr.splitlines()
  assert 'read-only' in line
  happened(line.replace(str(tmp_path), '...'))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('size', 'codes'),
  [
    pytest.param(
      size,
      codes,
      marks=fault(
        f'a workdir on a disk of {size} bytes',
        'exit code 2 if it cannot begin; else it trains on, and ends with 4 '
        'for a last state that could not be saved',
      ),
    )
    for size, codes in [('4k', [2]), ('60k', [4]), ('300k', [4])]
  ],
)
def test_a_full_disk(tmp_path, start, happened, size, codes):
  with small_disk(tmp_path / 'disk', f'size={size}') as disk:
    run = start(disk / 'run')
    code = run.end()
    assert code in codes, run.output
    lines = [
      x for x in run.output.splitlines() if 'No space' in x or 'RESOURCE' in x
    ]
    assert lines
    assert 'Traceback' not in run.output, run.output
    assert code == 2 or 'unsaved at step 12/12' in run.output
  happened(f'exit code {code}')


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=[
        fault(
          f'a workdir named {name!r}', 'as any other, or refused in a line'
        ),
        *([] if often else [pytest.mark.full]),
      ],
    )
    for name, often in [
      ('with spaces ★ é', False),
      ('*[a]? %s', True),
      ('two\nlines', False),
      (b'not UTF-8 \xff', True),
    ]
  ],
)
def test_odd_names(tmp_path, run, command, happened, name):
  directory = os.fsencode(tmp_path) + b'/' + os.fsencode(name)
  process = run([*command(), b'--workdir=' + directory], env=os.environ)
  if isinstance(name, bytes) or '*' in name:
    # TensorStore takes no name that is not UTF-8, Orbax none that is a pattern.
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert not os.path.exists(directory)
    happened(f'exit code 2: {line[-100:]}')
    return
  assert process.returncode == 0, process.stderr
  place = pathlib.Path(os.fsdecode(directory))
  assert result_of(place)['status'] == 'done'
  words = [
    *(sys.executable, '-m', 'nanomoe.generate', '--num_tokens=5'),
    b'--workdir=' + directory,
  ]
  process = run([*words, '--prompt=a'])
  assert process.returncode == 0, process.stderr
  happened('done; text was generated from it')


@fault('a relative workdir, with .. in it', 'as any other')
@pytest.mark.slow
def test_a_relative_workdir(tmp_path, run, command, happened):
  relative = os.path.relpath(tmp_path / 'a' / '..' / 'run', ROOT)
  process = run(command(f'--workdir={relative}'))
  assert process.returncode == 0, process.stderr
  assert result_of(tmp_path / 'run')['status'] == 'done'
  happened('done')


# Streams.


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    pytest.param(
      name,
      words,
      marks=fault(
        f'standard output of nanomoe.{name} is full (/dev/full)',
        'one line, exit code 2',
      ),
    )
    for name, words in [
      ('generate', ['--prompt=a', '--num_tokens=3']),
      ('evaluate', []),
    ]
  ],
)
@pytest.mark.slow
def test_standard_output_is_full(finished, happened, name, words):
  with open('/dev/full', 'w') as full:
    process = subprocess.run(
      [
        *(sys.executable, '-m', f'nanomoe.{name}', f'--workdir={finished[0]}'),
        *words,
      ],
      cwd=ROOT,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      timeout=100,
    )
  assert process.returncode == 2, process.stderr
  (line,) = process.stderr.splitlines()
  assert 'No space left' in line
  happened(line)


@fault(
  'a terminal in ASCII, where a line has a ★',
  'the line is there, with an escape',
)
@pytest.mark.slow
def test_a_stream_that_cannot_say_it(tmp_path, start, happened):
  run = start(
    tmp_path / 'run',
    changes={'num_train_steps': 4},
    env={'PYTHONIOENCODING': 'ascii'},
  )
  assert run.end() == 0
  (line,) = [x for x in run.output.splitlines() if x.endswith('\\u2605')]
  assert 'val' in line
  assert '★' in (tmp_path / 'run' / 'log.txt').read_text()
  happened(line[-60:])
