"""What a tokenizer must do."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Int
import numpy as np

from nanomoe.data import large_text
from nanomoe.data.large_text import LargeText
from trainers.errors import UserError


class Tokenizer:
  """Text <-> integers in [0, vocab_size).

  A new run calls `fit` and stores `state_dict` in its vocabulary.json; who
  reads the run later calls `load_state_dict` instead.

  Attributes:
    vocab_size: known after either.
    fits_pieces: whether `fit` takes a `LargeText`; else it gets, of a large
      file too, a str.
  """

  vocab_size: int
  fits_pieces = False

  def fit(self, texts: Mapping[str, Any]) -> None:
    """Learns the vocabulary from the text of each split: a str.

    With `fits_pieces`, a str or a `nanomoe.data.large_text.LargeText`:
    `pieces` are of either.
    """

  def encode(self, text: str) -> Int[np.ndarray, ' length']:
    """int32. decode(encode(text)) == text.

    A large text comes in pieces, which are cut in front of white space.

    Raises:
      UserError: a part of the text has no token.
    """
    raise NotImplementedError

  def encode_pieces(
    self, text: str | LargeText
  ) -> Iterator[tuple[str, Int[np.ndarray, ' length']]]:
    """Yields the pieces of `text`, each with its tokens.

    A str is a single piece; a large text is cut in front of white space.

    Raises:
      UserError: a part of the text has no token.
    """
    position = 0
    for piece in large_text.pieces(text):
      try:
        tokens = self.encode(piece)
      except UserError as error:
        where = f'in what follows character {position:,}: ' if position else ''
        raise UserError(f'{where}{error}') from error
      yield piece, tokens
      position += len(piece)

  def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
    """U+FFFD stands for bytes that are no whole character."""
    raise NotImplementedError

  def token_bytes(self) -> list[bytes]:
    """The UTF-8 of each token: what bits per byte are counted by."""
    return [self.decode([t]).encode() for t in range(self.vocab_size)]

  def state_dict(self) -> dict[str, Any]:
    """JSON: what `fit` learned."""
    return {}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError if `state` is none of its."""
