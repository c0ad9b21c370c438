"""Interface of tokenizers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Int
import numpy as np

from nanomoe.data import large_text
from nanomoe.data.large_text import LargeText
from trainers.errors import UserError


class Tokenizer:
  """Base class of tokenizers, which map texts to integers and back.

  A new run calls `fit` and stores `state_dict` in its vocabulary.json. A
  resumed run and the commands call `load_state_dict` instead.

  Attributes:
    vocab_size: Number of tokens, known after `fit` or `load_state_dict`. Tokens
      are in [0, vocab_size).
    fits_pieces: True if `fit` takes a `LargeText`; False if `fit` needs a str
      even for a large file.
  """

  vocab_size: int
  fits_pieces = False

  def fit(self, texts: Mapping[str, Any]) -> None:
    """Learns the vocabulary.

    Args:
      texts: Text of each split, as a str. If `fits_pieces`, a text can also be
        a `nanomoe.data.large_text.LargeText`; `large_text.pieces` reads both.
    """

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    """Returns the tokens of `text` as int32 `[length]`.

    decode(encode(text)) must equal text. A large text is passed in pieces that
    are cut before white space.

    Raises:
      UserError: A part of the text has no token.
    """
    raise NotImplementedError

  def encode_pieces(
    self, text: str | LargeText
  ) -> Iterator[tuple[str, Int[np.ndarray, ' length']]]:
    """Yields the pieces of `text`, each with its tokens.

    A str is a single piece. A large text is cut before white space.

    Raises:
      UserError: A part of the text has no token.
    """
    position = 0
    for piece in large_text.pieces(text):
      try:
        tokens = self.encode(piece)
      except UserError as error:
        where = f'after character {position:,}: ' if position else ''
        raise UserError(f'{where}{error}') from error
      yield piece, tokens
      position += len(piece)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """Returns the text of tokens; U+FFFD replaces incomplete characters."""
    raise NotImplementedError

  def token_bytes(self) -> list[bytes]:
    """Returns the UTF-8 of each token, which bits per byte depend on."""
    return [self.decode([t]).encode() for t in range(self.vocab_size)]

  def state_dict(self) -> dict[str, Any]:
    """Returns the learned vocabulary as a JSON object."""
    return {}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    """Restores the vocabulary from a result of `state_dict`.

    Raises:
      ValueError, TypeError, KeyError: `state` is invalid.
    """
