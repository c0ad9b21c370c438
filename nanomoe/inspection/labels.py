"""Labels of tokens: the token itself, its class, position, speaker or text."""

import codecs
from collections.abc import Callable, Sequence
import itertools
import re
from typing import NamedTuple

from jaxtyping import Int
import numpy as np

# The line before a speech, after an empty line, as in Tiny Shakespeare.
_SPEAKER = re.compile(
  r'(?:\A|(?<=\n\n)|(?<=\n\r\n))([^\W\d_][^\n:]{0,40}):[ \t\r]*$',
  re.MULTILINE,
)
OTHER = 'other'
MAX_TOKENS = 40  # Labels of a figure; less frequent ones are one label.
MAX_SPEAKERS = 16


class Labels(NamedTuple):
  """A label for each token, and the units that a permutation exchanges.

  Attributes:
    names: Name of each label.
    ids: Label of each token, as an index of `names`; -1 without a label.
    units: Unit of each token. Without `rotates`, all tokens of a unit have one
      label, and a permutation exchanges the labels of units: of tokens,
      speeches or windows.
    rotates: Whether a permutation rotates the labels within each unit, by a
      random number of tokens. Units are then windows.
  """

  names: list[str]
  ids: Int[np.ndarray, ' tokens']
  units: Int[np.ndarray, ' tokens']
  rotates: bool = False


def pieces(utf8: Sequence[bytes]) -> list[str]:
  """Returns the characters that each token completes.

  The last token of a character has the character; the tokens before have ''.
  U+FFFD replaces invalid bytes.

  Args:
    utf8: UTF-8 of each token of a text.
  """
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  return [decoder.decode(part) for part in utf8]


def shown(utf8: bytes) -> str:
  """Returns the name of a token: its text, or its bytes in hexadecimal."""
  try:
    return utf8.decode()
  except UnicodeDecodeError:
    return ''.join(f'\\x{byte:02x}' for byte in utf8)


def of_tokens(
  tokens: Int[np.ndarray, ' tokens'], token_bytes: Sequence[bytes]
) -> Labels:
  """Returns the tokens as labels, most frequent first.

  Args:
    tokens: Token ids.
    token_bytes: UTF-8 of each token of the vocabulary.
  """
  names = [shown(token_bytes[t]) for t in tokens.tolist()]
  return _by_token(_frequent(names, MAX_TOKENS))


def of_classes(
  tokens: Int[np.ndarray, ' tokens'], token_bytes: Sequence[bytes]
) -> Labels:
  """Returns the classes of tokens as labels.

  Args:
    tokens: Token ids.
    token_bytes: UTF-8 of each token of the vocabulary.
  """
  class_of = {t: token_class(token_bytes[t]) for t in set(tokens.tolist())}
  return _by_token(_frequent([class_of[t] for t in tokens.tolist()]))


def token_class(utf8: bytes) -> str:
  """Returns the class of a token, by its characters without outer spaces."""
  try:
    text = utf8.decode()
  except UnicodeDecodeError:
    return 'part of a character'
  core = text.strip()
  if not core:
    return 'whitespace'
  tests: dict[str, Callable[[str], bool]] = {
    'digits': str.isdigit,
    'lower case': lambda s: s.isalpha() and s[0].islower(),
    'upper case': lambda s: s.isalpha() and s[0].isupper(),
    'other letters': str.isalpha,
    'punctuation': lambda s: not any(map(str.isalnum, s)),
  }
  return next((name for name, test in tests.items() if test(core)), 'mixed')


def of_positions(
  positions: Int[np.ndarray, ' tokens'], windows: Int[np.ndarray, ' tokens']
) -> Labels:
  """Returns ranges of positions as labels: 0, 1, 2-3, 4-7, and so on.

  A permutation rotates each window, because neighbouring tokens are not
  independent.

  Args:
    positions: Position of each token in its window.
    windows: Window of each token.
  """
  ids = np.array([int(p).bit_length() for p in range(positions.max() + 1)])
  starts = [0, *(1 << i for i in range(ids.max()))]
  names = [
    str(start) if start < 2 else f'{start}-{2 * start - 1}' for start in starts
  ]
  return Labels(names, ids[positions], windows, rotates=True)


def of_speakers(
  text_pieces: Sequence[str], text: Int[np.ndarray, ' tokens']
) -> Labels:
  """Returns the speaker of each token as its label.

  A line after an empty one that consists of a capitalized name and a colon
  begins a speech, which does not leave its text. The tokens of that line have
  no label.

  Args:
    text_pieces: Characters of each token.
    text: Index of each token's text.
  """
  starts = np.cumsum([0, *map(len, text_pieces)])[:-1]
  names, places = [], []
  ends = (np.flatnonzero(np.diff(text)) + 1).tolist()
  for first, end in itertools.pairwise([0, *ends, len(text)]):
    for match in _SPEAKER.finditer(''.join(text_pieces[first:end])):
      if match.group(1)[0].isupper():
        names.append(match.group(1))
        places.append(starts[first] + np.array(match.span()))
  begin, end = np.array(places, int).reshape(-1, 2).T
  speech = np.searchsorted(begin, starts, side='right') - 1  # [tokens]
  has_label = speech >= 0
  spoken = speech[has_label]
  text_of_speech = text[np.searchsorted(starts, begin, side='right') - 1]
  has_label[has_label] = (starts[has_label] > end[spoken]) & (
    text[has_label] == text_of_speech[spoken]
  )
  labels = _frequent(
    [names[s] if ok else '' for s, ok in zip(speech, has_label, strict=True)],
    MAX_SPEAKERS,
  )
  return Labels(*labels, speech)


def of_texts(
  names: Sequence[str],
  text: Int[np.ndarray, ' tokens'],
  windows: Int[np.ndarray, ' tokens'],
) -> Labels:
  """Returns the text of each token as its label; windows are the units.

  Args:
    names: Name of each text.
    text: Index of each token's text.
    windows: Window of each token.
  """
  return Labels(list(names), text, windows)


def _by_token(found: tuple[list[str], np.ndarray]) -> Labels:
  return Labels(*found, np.arange(len(found[1])))


def _frequent(
  labels: Sequence[str], at_most: int | None = None
) -> tuple[list[str], np.ndarray]:
  """Returns the most frequent labels, and the index of each token's label.

  Args:
    labels: Label of each token; '' for none.
    at_most: Number of labels; further ones are the last label, `OTHER`.
  """
  names, inverse, counts = np.unique(
    np.array(labels, dtype=object), return_inverse=True, return_counts=True
  )
  counts = np.where(names == '', 0, counts)
  order = np.argsort(-counts, kind='stable')[: np.count_nonzero(counts)]
  kept = order[:at_most]
  index = np.full(len(names), len(kept))
  index[kept] = np.arange(len(kept))
  index[names == ''] = -1
  rest = [OTHER] if len(order) > len(kept) else []
  return [*names[kept].tolist(), *rest], index[inverse]
