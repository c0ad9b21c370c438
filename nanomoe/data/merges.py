"""Learns the merges of byte-pair encoding from a text of any size."""

import atexit
from collections.abc import Iterator
from concurrent import futures
import logging
import os
import sys
import threading
import time

import tokenizers as library

from nanomoe.data import large_text
from nanomoe.data.large_text import LargeText

log = logging.getLogger(__name__)

# Largest number of characters in a word. Learning takes time quadratic in the
# length of a word, and a text without white space is a single word.
MAX_WORD = 256
# Words of GPT-2 (Radford et al. 2019) with at most MAX_WORD characters.
_WORDS = (
  "'s|'t|'re|'ve|'m|'ll|'d"
  r'| ?\p{{L}}{{1,{rest}}}| ?\p{{N}}{{1,{rest}}}'
  r'| ?[^\s\p{{L}}\p{{N}}]{{1,{rest}}}'
  r'|\s{{1,{whole}}}(?!\S)|\s{{1,{whole}}}'
).format(rest=MAX_WORD - 1, whole=MAX_WORD)
# Characters that the library gets at once: its memory grows with them.
PIECE_CHARS = 1 << 14
PROGRESS_SECONDS = 10.0  # Time between two progress lines.
_STOP_SECONDS = 0.5  # Time that the library gets to stop after a signal.


def learn(vocab_size: int, text: str | LargeText) -> library.Tokenizer:
  """Returns a byte-level tokenizer with the most frequent merges of `text`.

  Words are split after `MAX_WORD` characters. The split is part of the
  tokenizer, so every tool that encodes with the tokenizer splits the same way.

  The library ignores signals, so it runs in a separate thread and the caller's
  thread waits. KeyboardInterrupt is raised immediately.

  Args:
    vocab_size: Largest number of tokens, the 256 bytes included.
    text: Training text.

  Returns:
    A tokenizer of the `tokenizers` library.

  Raises:
    UserError: The file of `text` cannot be read or has changed.
  """
  pre = library.pre_tokenizers  # pyright: ignore
  tokenizer = library.Tokenizer(library.models.BPE())
  words = _word_split()
  tokenizer.pre_tokenizer = pre_tokenizer()  # pyright: ignore
  trainer = library.trainers.BpeTrainer(  # pyright: ignore
    vocab_size=vocab_size,
    show_progress=False,
    initial_alphabet=pre.ByteLevel.alphabet(),
  )
  stop = threading.Event()
  num_read = 0

  def read() -> Iterator[str]:
    nonlocal num_read
    for piece in _pieces(text, words):
      if stop.is_set():
        raise RuntimeError('interrupted')
      num_read += len(piece)
      yield piece

  done: futures.Future = futures.Future()

  def work() -> None:
    try:
      tokenizer.train_from_iterator(read(), trainer)
      done.set_result(None)
    except BaseException as error:  # result() raises it in the caller's thread.
      done.set_exception(error)

  thread = threading.Thread(target=work, name='bpe', daemon=True)

  def leave() -> None:
    # The library aborts the process if it returns while Python shuts down.
    if thread.is_alive():
      logging.shutdown()
      for stream in (sys.stdout, sys.stderr):
        if stream:
          stream.flush()
      os._exit(os.EX_TEMPFAIL)  # Exit code of an interrupted command.

  log.info(
    'learning %d tokens from %s characters', vocab_size, f'{len(text):,}'
  )
  began = time.monotonic()
  atexit.register(leave)
  thread.start()
  try:
    while not futures.wait([done], PROGRESS_SECONDS).done:
      share = 100 * num_read // len(text)
      phase = f'read {share} %' if share < 100 else 'merging pairs'
      log.info(
        'learning tokens: %s, %.0f s so far', phase, time.monotonic() - began
      )
    done.result()
  finally:
    stop.set()
    thread.join(_STOP_SECONDS)
    if not thread.is_alive():
      atexit.unregister(leave)
  return tokenizer


def pre_tokenizer() -> library.pre_tokenizers.PreTokenizer:
  """Returns the split of a text into words of bytes."""
  pre = library.pre_tokenizers  # pyright: ignore
  return pre.Sequence(
    [_word_split(), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
  )


def _word_split() -> library.pre_tokenizers.PreTokenizer:
  """Returns the split of a text into words of characters."""
  split = library.pre_tokenizers.Split  # pyright: ignore
  return split(library.Regex(_WORDS), 'isolated')


def _pieces(
  text: str | LargeText, splitter: library.pre_tokenizers.PreTokenizer
) -> Iterator[str]:
  """Yields `text` in pieces that begin with a word."""
  rest = ''
  for chunk in large_text.chunks(text, PIECE_CHARS):
    rest += chunk
    at = large_text.last_word(rest)
    if not at:
      # The last word of `rest` may continue in the next chunk.
      words = splitter.pre_tokenize_str(rest)
      at = words[-2][1][0] if len(words) > 1 else 0
    if at:
      yield rest[:at]
      rest = rest[at:]
  if rest:
    yield rest
