"""Batches of windows of a long sequence of tokens."""

from collections.abc import Iterator
import hashlib
import zlib

from jaxtyping import Integer
import numpy as np

from trainers.errors import UserError
from trainers.task import Batch


class ShortSplit(UserError):
  """A split with too few tokens; who knows the text puts its path in front."""


class Windows:
  """A `trainers.task.Dataset`: random windows to train, fixed ones to evaluate.

  A window is `block_size` inputs and, one further on, as many targets. Batch
  `index` is a function of (seed, index): nothing else needs to be saved.

  Args:
    splits: tokens by name: 'train' and 'val'. They may be memory-mapped.
    seed: of the windows.
    batch_size, block_size: rows and columns of a batch.
    eval_iters: batches of an evaluation; 0: each target of the split, once.

  Raises:
    ShortSplit: a split is shorter than a window and its targets; or, if it is
      only evaluated on and `eval_iters` is 0, shorter than two tokens: such a
      pass pads its last window.
  """

  def __init__(
    self,
    splits: dict[str, Integer[np.ndarray, ' length']],
    *,
    seed: int,
    batch_size: int,
    block_size: int,
    eval_iters: int,
  ):
    problems = []
    for name, tokens in splits.items():
      is_padded = not eval_iters and name != 'train'
      needed = 2 if is_padded else block_size + 1
      if len(tokens) < needed:
        reason = 'an evaluation' if is_padded else f'{block_size=}'
        problems.append(
          f'the {name} split has too few tokens, {len(tokens)} of the {needed} '
          f'that {reason} needs'
        )
    if problems:
      raise ShortSplit(problems)
    self.splits = splits
    self.seed = seed
    self.batch_size = batch_size
    self.block_size = block_size
    self.eval_iters = eval_iters
    self.fingerprint = _fingerprint(splits)

  def train_batch(self, index: int, rows: slice) -> Batch:
    return self._random_batch('train', 0, index, rows)

  def eval_batches(self, split: str, rows: slice) -> Iterator[Batch]:
    if not self.eval_iters:
      yield from self._one_pass(split, rows)
    for index in range(self.eval_iters):
      # Its own streams: no split's windows repeat those of training.
      stream = 1 + zlib.crc32(split.encode())
      yield self._random_batch(split, stream, index, rows)

  def _random_batch(
    self, split: str, stream: int, index: int, rows: slice
  ) -> Batch:
    # Counter-based: any batch costs the same, whatever came before.
    bits = np.random.Philox(key=[self.seed, stream], counter=[0, 0, 0, index])
    tokens = self.splits[split]
    starts = np.random.Generator(bits).integers(
      0, len(tokens) - self.block_size, size=self.batch_size
    )[rows]
    places = starts[:, None] + np.arange(self.block_size + 1)
    windows = tokens[places].astype(np.int32)
    return {
      'inputs': windows[:, :-1],
      'targets': windows[:, 1:],
      'weights': np.ones((len(starts), self.block_size), np.float32),
    }

  def _one_pass(self, split: str, rows: slice) -> Iterator[Batch]:
    """Consecutive windows; what is missing of the last batch is padding."""
    tokens = self.splits[split]
    num_targets = len(tokens) - 1
    shape = self.batch_size, self.block_size
    size = self.batch_size * self.block_size
    for start in range(0, num_targets, size):
      stop = min(start + size, num_targets)

      def batch(values, count=stop - start):
        return np.pad(values, (0, size - count)).reshape(shape)[rows]

      window = tokens[start : stop + 1].astype(np.int32)

      yield {
        'inputs': batch(window[:-1]),
        'targets': batch(window[1:]),
        'weights': batch(np.ones(stop - start, np.float32)),
      }


def _fingerprint(splits: dict[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name, tokens in splits.items():
    digest.update(f'{name}:{len(tokens)}:'.encode())
    for start in range(0, len(tokens), 1 << 20):  # They may be many.
      part = tokens[start : start + (1 << 20)]
      digest.update(part.astype(np.int32).tobytes())
  return digest.hexdigest()[:16]
