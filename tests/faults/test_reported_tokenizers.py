"""What users report of tokenizers: long words, large texts, common files.

A tokenizer.json here is what the library writes, small, with one setting of a
common family.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers as library

from faults.conftest import fault
from faults.test_input import one_line
from nanomoe.data import bpe as bpe_lib
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import large_text, merges, tokenizers
from nanomoe.data import pipeline as text_lib
from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizers import Bytes, Characters
from tests.shrunk import ROOT

reported = pytest.mark.reported
pre_tokenizers = library.pre_tokenizers
BAR = '\uff5c'  # Of full width.
END = f'<{BAR}end▁of▁sentence{BAR}>'
TEXT = (
  'ROMEO:\nWhat light, 12345 of them!\n\n    it is\tthe   East;\r\n'
  "I'm théâtre 漢字 😀\n"
)


def dna(num_chars):
  return ''.join(random.Random(0).choices('ACGT', k=num_chars))


@pytest.fixture(scope='module')
def state():
  """state(**changes) -> a byte-level tokenizer.json, by those of its keys."""
  tokenizer = library.Tokenizer(library.models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = library.trainers.BpeTrainer(
    vocab_size=300,
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  tokenizer.train_from_iterator([TEXT * 9], trainer)
  learned = tokenizer.to_str()

  def make(**changes):
    made = json.loads(learned)
    for name, value in changes.items():
      if name == 'dropout':
        made['model']['dropout'] = value
      elif name == 'added_tokens':
        made[name] = [
          {'id': 300 + i, 'special': False, **FLAGS, **token}
          for i, token in enumerate(value)
        ]
      elif hasattr(value, '__getstate__') and not isinstance(
        value, dict | list | None
      ):
        made[name] = json.loads(value.__getstate__())
      else:
        made[name] = value
    return made

  return make


FLAGS = {
  'single_word': False,
  'lstrip': False,
  'rstrip': False,
  'normalized': False,
}


@pytest.fixture
def write(tmp_path):
  """write(state) -> a BPE whose file has it."""

  def make(made):
    path = tmp_path / 'tokenizer.json'
    path.write_text(json.dumps(made), encoding='utf-8')
    return BPE(file=str(path))

  return make


@pytest.fixture
def small_pieces(monkeypatch, tmp_path):
  """Any text is cut often; a large one is anything."""
  monkeypatch.setattr(bpe_lib, 'PIECE_CHARS', 40)
  monkeypatch.setattr(bpe_lib, 'LOOK_AHEAD', 24)
  monkeypatch.setattr(merges, 'PIECE_CHARS', 40)
  monkeypatch.setattr(large_text, 'PIECE_BYTES', 33)
  monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def from_file(path, text):
  path.write_bytes(text.encode())
  found = corpus_lib.read(str(path))
  assert isinstance(found.text, large_text.LargeText)
  return found


# Long words.


@reported('1')
@fault(
  'BPE, learned from 300 kB of random ACGT without white space',
  'words are split at 256 characters: seconds, not minutes',
)
def test_a_text_without_white_space(happened):
  began = time.monotonic()
  tokenizer = BPE(1024)
  text = dna(300_000)
  tokenizer.fit({'train': text})
  tokens = tokenizer.encode(text)
  seconds = time.monotonic() - began
  assert tokenizer.vocab_size == 1024
  assert tokenizer.decode(tokens) == text
  assert seconds < 40  # Whole, it is 85 on an idle machine.
  happened('learned and encoded')


@reported('1')
@fault(
  'a vocabulary learned from long words, saved, read by the library alone',
  'the file holds the split: equal tokens',
)
def test_the_split_is_in_the_file(happened):
  text = dna(3000) + ' ' * 700 + 'end ' + '-' * 600 + '漢' * 900
  tokenizer = BPE(300)
  tokenizer.fit({'train': text})
  made = tokenizer.state_dict()['tokenizer']
  alone = library.Tokenizer.from_str(json.dumps(made))
  assert alone.encode(text).ids == tokenizer.encode(text).tolist()
  words = alone.pre_tokenizer.pre_tokenize_str(text)
  lengths = [stop - start for _, (start, stop) in words]
  assert max(lengths) == merges.MAX_WORD
  assert sum(lengths) == len(text)
  happened('equal tokens; no word above 256 characters')


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(
  st.text(st.sampled_from("ab's \n\té漢7.") | st.characters(codec='utf-8'))
)
def test_short_words_are_those_of_gpt2(text):
  ours = pre_tokenizers.Split(library.Regex(merges._WORDS), 'isolated')
  theirs = pre_tokenizers.ByteLevel(add_prefix_space=False)
  assert [span for _, span in ours.pre_tokenize_str(text)] == [
    span for _, span in theirs.pre_tokenize_str(text) if span[0] < span[1]
  ]


@reported('1')
@fault(
  'long words in a text that is held, and in one that is read in pieces',
  'the same vocabulary, and the same tokens',
)
def test_long_words_in_pieces(tmp_path, small_pieces, happened):
  text = f'{dna(2000)} {"é" * 900}\n{" " * 800}{TEXT * 3}{dna(1000)}'
  found = from_file(tmp_path / 'text.txt', text)
  held, in_pieces = BPE(300), BPE(300)
  held.fit({'train': text})
  in_pieces.fit({'train': found.text})
  assert held.state_dict() == in_pieces.state_dict()
  tokens = text_lib.tokenize(
    {'train': found.text}, in_pieces, found.fingerprint
  )
  np.testing.assert_array_equal(tokens['train'], held.encode(text))
  whole = held._tokenizer.encode(text).ids
  assert tokens['train'].tolist() == whole
  happened('equal')


@reported('1')
@fault(
  'a vocabulary of an older version, which splits no word, and a long word',
  'its tokens are what they were: the run can be resumed',
)
def test_an_older_vocabulary(state, tmp_path, small_pieces, happened):
  text = TEXT + 'the' * 3000 + ' ' * 500 + TEXT
  made = state()
  older = BPE()
  older.load_state_dict({'tokenizer': made})
  alone = library.Tokenizer.from_str(json.dumps(made))
  assert older.encode(text).tolist() == alone.encode(text).ids
  # It cut large texts elsewhere.
  found = from_file(tmp_path / 'text.txt', text).text
  pieces = large_text.pieces(found)
  wanted = [(piece, alone.encode(piece).ids) for piece in pieces]
  assert [
    (piece, tokens.tolist()) for piece, tokens in older.encode_pieces(found)
  ] == wanted
  assert older.state_dict() == {'tokenizer': made}
  happened('equal tokens')


LEARN = """
import atexit, pathlib, sys
from nanomoe.run import cli as command, terminal
from nanomoe.data import merges
from nanomoe.data.bpe import BPE

atexit.register(print, 'late')

def main(_):
  terminal.log_to_terminal()
  merges.PROGRESS_SECONDS = 0.2
  text = pathlib.Path(sys.argv[1]).read_text()
  BPE(50_000).fit({'train': text})
  return 0

command.run(main, lambda argv: None)
"""


@reported('1')
@pytest.mark.parametrize(
  ('number', 'phase'),
  [
    pytest.param(
      number,
      phase,
      marks=fault(
        f'{number.name} while BPE is learned ({phase})',
        'exit code 75 within seconds',
      ),
      id=f'{number.name}, {phase}',
    )
    for number, phase in [
      (signal.SIGINT, 'read'),
      (signal.SIGTERM, 'merging'),
    ]
  ],
)
def test_a_signal_while_it_learns(tmp_path, happened, number, phase):
  path = tmp_path / 'text.txt'
  path.write_text(dna(6_000_000))
  with subprocess.Popen(
    [sys.executable, '-c', LEARN, str(path)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as process:
    assert process.stdout
    line = next(x for x in process.stdout if phase in x or 'Error' in x)
    assert phase in line
    sent = time.monotonic()
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait(60) == 75, rest
    seconds = time.monotonic() - sent
  assert 'interrupted' in rest
  # It leaves at once: a library that returns while Python shuts down aborts.
  assert phase == 'read' or 'late' not in rest
  assert seconds < 10  # About one, on an idle machine.
  happened('exit code 75')


@reported('1')
@fault('BPE that learns for long', 'lines of progress')
def test_progress_of_learning(monkeypatch, caplog, happened):
  monkeypatch.setattr(merges, 'PROGRESS_SECONDS', 0.01)
  caplog.set_level('INFO')
  tokenizer = BPE(2000)
  tokenizer.fit({'train': dna(200_000)})
  tokenizer.encode(dna(200_000))
  lines = [r.getMessage() for r in caplog.records]
  assert lines[0] == 'learning 2000 tokens from 200,000 characters'
  assert any('merging' in line for line in lines)
  assert any('tokenizing' in line and '%' in line for line in lines)
  happened(next(line for line in lines if 'merging' in line))


@reported('1')
@fault('a large text that changes while BPE is learned from it', 'one line')
def test_a_text_that_changes_while_it_is_learned(
  tmp_path, small_pieces, happened
):
  path = tmp_path / 'text.txt'
  found = from_file(path, TEXT * 20)
  path.write_text('another')
  line = one_line(BPE().fit, {'train': found.text})
  assert 'changed' in line
  happened(line.replace(str(tmp_path), '...'))


# Large texts.


def splits_of(pattern, *more):
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(library.Regex(pattern), 'isolated'),
      *more,
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


# How common families cut words: a cut in front of white space is not always
# between two of them (".\n" is one word of LLAMA3).
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
FAMILIES = {
  'GPT-2': {},
  'Llama 3': {'pre_tokenizer': splits_of(LLAMA3)},
  'StarCoder': {
    'pre_tokenizer': pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
      ]
    ),
  },
  'DeepSeek': {
    'pre_tokenizer': splits_of(
      r'\p{N}{1,3}',
      pre_tokenizers.Split(library.Regex('[一-龥]+'), 'isolated'),
      pre_tokenizers.Split(library.Regex(LLAMA3), 'isolated'),
    ),
    'added_tokens': [{'content': END, 'special': True}],
  },
  'GPT-NeoX': {
    'normalizer': library.normalizers.NFC(),
    'added_tokens': [{'content': ' ' * n} for n in range(16, 1, -1)],
  },
  'words alone': {
    'added_tokens': [{'content': 'the', 'single_word': True}],
  },
}


@reported('4')
@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=fault(
        f'a text in pieces, with the words of {name}',
        'the tokens are those of the whole text',
      ),
    )
    for name in FAMILIES
  ],
)
def test_pieces_and_the_whole(
  state, write, tmp_path, small_pieces, happened, name, in_memory
):
  rng = random.Random(1)
  parts = ['the', ' cat', '.\n', '  \n', ' ' * 20, "'s", '漢字', ' 1234', '!!']
  parts += [END, '\r\n\r\n', 'x' * 50, ' théâtre', '\t']
  text = ''.join(rng.choices(parts, k=2000))
  made = state(**FAMILIES[name])
  tokenizer = write(made)
  tokenizer.fit({'train': text})
  whole = library.Tokenizer.from_str(json.dumps(made)).encode(text).ids
  if in_memory:
    pieces = list(tokenizer.encode_pieces(text))
    assert len(pieces) > 20
    found = tokenizer.encode(text)
    joined = np.concatenate([tokens for _, tokens in pieces])
    assert joined.tolist() == found.tolist()
  else:
    of_file = from_file(tmp_path / 'text.txt', text)
    tokens = text_lib.tokenize(
      {'train': of_file.text}, tokenizer, of_file.fingerprint
    )
    found = tokens['train']
  assert found.tolist() == whole
  happened('equal tokens')


@reported('4')
@fault(
  'an added token for whole words, in a text where each cut would make it one',
  'no cut changes a token',
)
def test_a_cut_that_would_change_tokens(state, write, small_pieces, happened):
  made = state(added_tokens=[{'content': 'zq', 'single_word': True}])
  text = ''.join('7' * (i % 6 + 1) + 'zq!' for i in range(500))
  tokenizer = write(made)
  tokenizer.fit({'train': text})
  whole = library.Tokenizer.from_str(json.dumps(made)).encode(text).ids
  assert 300 not in whole
  assert tokenizer.encode(text).tolist() == whole
  happened('equal tokens')


@reported('4')
@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.lists(st.sampled_from(["'", 's', ' ', '\n', 'ab', '.', '7', '漢'])))
def test_any_cut_is_between_words(parts):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bpe_lib, 'PIECE_CHARS', 5)
    patch.setattr(bpe_lib, 'LOOK_AHEAD', 4)
    tokenizer = BPE(256)
    tokenizer.fit({'train': ''})
    made = tokenizer.state_dict()
    # Merges that would hold what a wrong cut parts.
    alone = library.Tokenizer.from_str(json.dumps(made['tokenizer']))
    text = ''.join(parts) * 4
    words = alone.pre_tokenizer.pre_tokenize_str(text)
    ends = {stop for _, (_, stop) in words}
    at = 0
    for piece, _ in tokenizer.encode_pieces(text):
      at += len(piece)
      assert at in ends


@reported('4')
@pytest.mark.parametrize('kind', ['learned', 'older', 'without words'])
def test_a_held_text_is_encoded_in_pieces(state, monkeypatch, kind):
  """What the library gets at once does not grow with the text."""
  tokenizer = BPE(300)
  if kind == 'learned':
    tokenizer.fit({'train': TEXT})
  else:
    no_words = {
      'pre_tokenizer': None,
      'normalizer': library.normalizers.ByteLevel(),
    }
    made = state(**(no_words if 'without' in kind else {}))
    cuts = {'cuts': 'between words'} if 'without' in kind else {}
    tokenizer.load_state_dict({'tokenizer': made, **cuts})
    monkeypatch.setattr(bpe_lib, 'MAX_WORD', 50_000)
  real, sizes = tokenizer._tokenizer, []

  class Spy:
    normalizer = None

    def encode(self, text, **kwargs):
      sizes.append(len(text))
      return real.encode(text, **kwargs)

  monkeypatch.setattr(tokenizer, '_tokenizer', Spy())
  text = TEXT * 3000
  assert len(text) > 200_000
  assert tokenizer.decode(tokenizer.encode(text)) == text
  assert max(sizes) < (100_000 if 'without' in kind else 2.5 * 2**14)


@reported('4')
@pytest.mark.parametrize(
  'kind',
  [
    pytest.param(
      kind,
      marks=fault(
        f'the tokenizer {kind.__name__}, and a text of 0.9 MB that is held',
        'at most 8 bytes of memory for a character, tokens included',
      ),
    )
    for kind in (Characters, Bytes, BPE)
  ],
)
def test_memory_of_a_held_text(happened, kind):
  text = 'to be, or not to be: that is the question\r\n' * 20_000
  tokenizer = kind()
  tokenizer.fit({'train': text[:10_000]})
  tracemalloc.start()
  try:
    tokenizer.encode(text)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 8 * len(text)
  happened(f'{peak / len(text):.1f} bytes for a character')


PEAK = """
import resource, sys
from nanomoe.data import corpus, tokenizers
from nanomoe.data import pipeline as text

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
found = corpus.read(sys.argv[1])
tokenizer = tokenizers.build({'type': 'BPE', 'vocab_size': 300})
tokenizer.fit(text.split(found.text))
text.tokenize(text.split(found.text), tokenizer, found.fingerprint)
print(peak() - before)
"""


@reported('4')
@pytest.mark.slow
@pytest.mark.parametrize(
  'megabytes',
  [
    pytest.param(
      megabytes,
      marks=[
        fault(
          f'BPE on a text of {megabytes} MB',
          'at most 8 times as much memory, beside what Python has',
        ),
        *([] if megabytes > 34 else [pytest.mark.full]),
      ],
    )
    for megabytes in (33.0, 34.5)
  ],
)
def test_peak_memory(tmp_path, happened, megabytes):
  rng = random.Random(0)
  words = ''.join(
    f'the {rng.randrange(10**4)}, or not to be\n' for _ in range(9**5)
  )
  size = int(megabytes * 1e6)
  path = tmp_path / 'text.txt'
  path.write_text((words * (size // len(words) + 1))[:size])
  process = subprocess.run(
    [sys.executable, '-c', PEAK, str(path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=900,
    env={**os.environ, 'XDG_CACHE_HOME': str(tmp_path / 'cache')},
  )
  assert process.returncode == 0, process.stderr[-2000:]
  more = int(process.stdout.split()[-1])
  assert more < 8 * size
  happened(f'{more / size:.1f} times the text')


# Settings of a tokenizer.json that change texts.


def padding(length):
  return {
    'strategy': {'Fixed': length},
    'direction': 'Right',
    'pad_to_multiple_of': 8,
    'pad_id': 3,
    'pad_type_id': 0,
    'pad_token': '[PAD]',
  }


TRUNCATION = {
  'direction': 'Right',
  'max_length': 4,
  'strategy': 'LongestFirst',
  'stride': 0,
}
PREFIX = pre_tokenizers.ByteLevel(add_prefix_space=True)
STRIP = library.normalizers.Sequence(
  [library.normalizers.NFC(), library.normalizers.Strip()]
)
SETTINGS = [
  ('3', 'padding', {'padding': padding(64)}, 'padding'),
  ('3', 'truncation', {'truncation': TRUNCATION}, 'truncation'),
  ('7', 'BPE dropout of 0.5', {'dropout': 0.5}, 'dropout=0.5'),
  ('3', 'a prefix space', {'pre_tokenizer': PREFIX}, 'add_prefix_space'),
  ('3', 'a normalizer that strips', {'normalizer': STRIP}, 'strip_left'),
  (
    '3',
    'an added token that eats spaces before and after',
    {'added_tokens': [{'content': 'it', 'lstrip': True, 'rstrip': True}]},
    'lstrip=true, rstrip=true',
  ),
]


@pytest.mark.parametrize(
  'place', ['tokenizer.json', 'an older vocabulary.json']
)
@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    pytest.param(
      changes,
      told,
      marks=[
        reported(row),
        fault(
          f'a tokenizer.json with {what}', 'it is disabled, and told in a line'
        ),
      ],
      id=what,
    )
    for row, what, changes, told in SETTINGS
  ],
)
def test_a_setting_that_changes_texts(
  state, write, caplog, tmp_path, happened, changes, told, place
):
  caplog.set_level('INFO')
  made = state(**changes)
  plain = state(
    **{k: v for k, v in changes.items() if k == 'added_tokens'},
  )
  for token in plain['added_tokens']:
    token.update(FLAGS)
  if place == 'tokenizer.json':
    tokenizer = write(made)
    tokenizer.fit({'train': TEXT, 'val': 'ROMEO:'})
  else:
    path = tmp_path / 'vocabulary.json'
    recorded = {'corpus': 'x', 'corpus_sha256': 'y', 'tokenizer': made}
    path.write_text(json.dumps(recorded))
    tokenizer = tokenizers.load({'type': 'BPE'}, path)
  (line,) = [r.getMessage() for r in caplog.records]
  assert told in line
  wanted = library.Tokenizer.from_str(json.dumps(plain))
  for text in ('ROMEO:', TEXT, ' a', 'a ', ' '):
    for _ in range(3):
      tokens = tokenizer.encode(text)
      assert tokens.tolist() == wanted.encode(text).ids
      assert tokenizer.decode(tokens) == text
  # What is stored is without it: the next start says nothing.
  caplog.clear()
  again = BPE()
  again.load_state_dict(json.loads(json.dumps(tokenizer.state_dict())))
  assert not caplog.records
  assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
  happened(line[:120])


@reported('7')
@fault(
  'a run with the tokenizer.json of BPE dropout, read again',
  'the same tokens: it can be resumed and evaluated',
)
def test_a_run_with_dropout(state, write, tiny, tmp_path, happened):
  path = write(state(dropout=0.3))._file
  text = tmp_path / 'text.txt'
  text.write_text(TEXT * 30)
  config = tiny(
    {
      'data.path': text,
      'data.tokenizer.type': 'BPE',
      'data.tokenizer.file': path,
    }
  )
  directory = tmp_path / 'run'
  directory.mkdir()
  corpus, tokenizer, first = text_lib.read(config, directory)
  kept = {
    **tokenizer.state_dict(),
    'corpus': corpus.name,
    'corpus_sha256': corpus.fingerprint,
  }
  (directory / 'vocabulary.json').write_text(json.dumps(kept))
  os.unlink(path)
  _, _, again = text_lib.read(config, directory)
  assert again.fingerprint == first.fingerprint
  happened('the same fingerprint of the data')


@reported('3')
@pytest.mark.parametrize(
  ('changes', 'part'),
  [
    pytest.param(
      changes,
      part,
      marks=fault(
        f'a tokenizer.json with {what}', 'one line: what it makes of the text'
      ),
      id=what,
    )
    for what, changes, part in [
      (
        'a normalizer for lower case',
        {'normalizer': library.normalizers.Lowercase()},
        "'ROMEO",
      ),
      (
        'a normalizer that removes accents',
        {
          'normalizer': library.normalizers.Sequence(
            [library.normalizers.NFD(), library.normalizers.StripAccents()]
          )
        },
        "'éâtre",
      ),
    ]
  ],
)
def test_a_normalizer_that_changes_the_text(
  state, write, happened, changes, part
):
  tokenizer = write(state(**changes))
  line = one_line(tokenizer.fit, {'train': TEXT.replace('th', '')})
  assert 'data.tokenizer.file' in line
  assert part in line
  assert 'character' in line
  tokenizer.fit({'train': 'romeo'})
  assert 'character' in one_line(tokenizer.encode, 'ROMÉO')
  happened(line.partition('json')[2][:120])


@reported('3')
@fault(
  'a prompt with a byte that a tokenizer.json lacks',
  'one line; the character is not lost',
)
def test_a_byte_without_a_token(state, write, happened):
  made = state()
  vocabulary = made['model']['vocab']
  # Of the byte 0x7f, which stands for nothing printable, and is no text here.
  vocabulary['unused'] = vocabulary.pop('ġ')
  tokenizer = write(made)
  tokenizer.fit({'train': TEXT})
  line = one_line(tokenizer.encode, 'to \x7f be')
  for part in ('character 3', r"'\x7f be'", "' be'"):
    assert part in line
  happened(line[:120])


# Added tokens.


ADDED = [
  ('18', 'Latin-1 letters', ['«end»', 'Größe', 'éÿ']),
  ('18', 'letters that stand for bytes', ['Ġæ', 'ĊĀ', 'ĠĠĠĠĠ']),
  ('families', 'runs of spaces', [' ' * n for n in range(24, 1, -1)]),
  ('families', 'tabs and new lines', ['\t\t', '\n\n', '\t\t\t\t']),
  ('families', f'▁ and {BAR}', [END, f'<{BAR}tool▁sep{BAR}>']),
  ('families', 'other scripts', ['漢字', '😀', '<|конец|>']),
]


@pytest.mark.parametrize('normalized', [True, False])
@pytest.mark.parametrize('special', [True, False])
@pytest.mark.parametrize(
  'added',
  [
    pytest.param(
      added,
      marks=[
        reported(row),
        fault(
          f'added tokens of {what} in a byte-level tokenizer.json',
          'they are text: one token each, and the text comes back',
        ),
      ],
      id=what,
    )
    for row, what, added in ADDED
  ],
)
def test_added_tokens_are_text(
  state, write, happened, added, special, normalized
):
  made = state(
    added_tokens=[
      {'content': content, 'special': special, 'normalized': normalized}
      for content in added
    ]
  )
  tokenizer = write(made)
  text = 'the x'.join(['', *added, ''])
  tokenizer.fit({'train': text + TEXT})
  table = tokenizer.token_bytes()
  assert tokenizer.vocab_size == 300 + len(added)
  for index, content in enumerate(added, 300):
    assert tokenizer.encode(content).tolist() == [index]
    assert table[index] == content.encode()
  tokens = tokenizer.encode(text)
  assert {300 + i for i in range(len(added))} <= set(tokens.tolist())
  assert tokenizer.decode(tokens) == text
  # What bits per byte are counted by.
  assert sum(len(table[t]) for t in tokens) == len(text.encode())
  again = BPE()
  again.load_state_dict(json.loads(json.dumps(tokenizer.state_dict())))
  assert again.token_bytes() == table
  happened('equal text; UTF-8 counted')


@reported('18')
@fault(
  'an added token that is also the byte of another character, or its bytes',
  'it is disabled, and told in a line: both come back as they were',
)
def test_an_added_token_that_is_ambiguous(state, write, caplog, happened):
  caplog.set_level('INFO')
  made = state()
  merged = next(m for m in map(''.join, made['model']['merges']) if 'Ġ' in m)
  contents = ['é', 'Ċ', merged, 'the', '«end»']
  tokenizer = write(
    state(added_tokens=[{'content': content} for content in contents])
  )
  text = f'{TEXT}é Ċ {merged} the 鱩«end»\n'
  tokenizer.fit({'train': text})
  (line,) = [r.getMessage() for r in caplog.records]
  assert all(f'added token "{content}"' in line for content in contents[:3])
  assert 'end' not in line
  tokens = tokenizer.encode(text)
  assert tokenizer.decode(tokens) == text
  assert tokenizer.encode('«end»').tolist()[0] >= 300
  happened(line[:120])


@reported('18')
@fault(
  'special tokens of a tokenizer.json, literally in the training text',
  'text as any other: one token there, given back as it was',
)
def test_special_tokens_in_the_text(state, write, happened):
  made = state(added_tokens=[{'content': '<|endoftext|>', 'special': True}])
  made['post_processor'] = {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': '<|endoftext|>', 'type_id': 0}},
      {'Sequence': {'id': 'A', 'type_id': 0}},
    ],
    'pair': [
      {'Sequence': {'id': 'A', 'type_id': 0}},
      {'Sequence': {'id': 'B', 'type_id': 1}},
    ],
    'special_tokens': {
      '<|endoftext|>': {
        'id': '<|endoftext|>',
        'ids': [300],
        'tokens': ['<|endoftext|>'],
      }
    },
  }
  tokenizer = write(made)
  text = f'the end.<|endoftext|>{TEXT}<|endoftext|>'
  tokenizer.fit({'train': text})
  tokens = tokenizer.encode(text)
  # Only those of the text: a template adds none.
  assert np.count_nonzero(tokens == 300) == 2
  assert tokenizer.decode(tokens) == text
  happened('two of them, two tokens; equal text')


@reported('families')
@fault(
  'a vocabulary with ▁ in learned tokens, as of SentencePiece',
  'one line: not byte-level',
)
def test_a_vocabulary_that_is_not_byte_level(state, write, happened):
  made = state()
  made['model']['vocab']['▁the'] = 300
  line = one_line(write(made).fit, {'train': 'the'})
  assert "'▁'" in line
  assert 'byte-level' in line
  happened(line.partition('json')[2])


@reported('families')
@fault('a tokenizer.json with a byte order mark', 'read as without')
def test_a_byte_order_mark(state, tmp_path, happened):
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(state()), encoding='utf-8-sig')
  tokenizer = BPE(file=str(path))
  tokenizer.fit({'train': TEXT})
  assert tokenizer.vocab_size == 300
  happened('read')


@reported('families')
@pytest.mark.parametrize(
  'content',
  [
    pytest.param(
      content,
      marks=fault(f'a tokenizer.json that is {what}', 'one line: byte-level'),
      id=what,
    )
    for what, content in [
      ('a list', '[]'),
      ('null', 'null'),
      ('deep', '[' * 100_000),
      ('without a model', '{"added_tokens": []}'),
    ]
  ],
)
def test_a_file_that_is_none(tmp_path, happened, content):
  path = tmp_path / 'tokenizer.json'
  path.write_text(content)
  line = one_line(BPE(file=str(path)).fit, {'train': 'the'})
  assert 'byte-level' in line
  happened(line.partition('json')[2][:120])
