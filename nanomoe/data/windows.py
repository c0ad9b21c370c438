"""Dataset of windows that are cut from a long sequence of tokens."""

from collections.abc import Iterator
import hashlib
import zlib

from jaxtyping import Integer
import numpy as np

from trainers.errors import UserError
from trainers.task import Batch


class ShortSplit(UserError):
  """Error of splits with too few tokens; the caller adds the text's path."""


class Windows:
  """Dataset of random windows to train on and fixed windows to evaluate on.

  A window has `block_size` inputs and `block_size` targets, which are the
  inputs shifted by one token. Training batch `index` is a function of (seed,
  index), so a checkpoint stores no other state of the dataset.

  Args:
    splits: Tokens of the splits 'train' and 'val', `[length]`; they may be
      memory-mapped.
    seed: Random seed of the windows.
    batch_size: Number of windows in a batch.
    block_size: Number of tokens in a window.
    eval_iters: Number of batches in an evaluation; 0 evaluates each target of
      the split once.

  Raises:
    ShortSplit: A split has fewer than block_size + 1 tokens. If `eval_iters` is
      0, an evaluation pads its last window and needs two tokens only.
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
          f'the {name} split is too short, with {len(tokens)} of the {needed} '
          f'tokens that {reason} needs'
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
      # A stream per split: no evaluation repeats the windows of training.
      stream = 1 + zlib.crc32(split.encode())
      yield self._random_batch(split, stream, index, rows)

  def _random_batch(
    self, split: str, stream: int, index: int, rows: slice
  ) -> Batch:
    # Counter-based generator: a batch needs no state of earlier batches.
    bits = np.random.Philox(key=[self.seed, stream], counter=[0, 0, 0, index])
    tokens = self.splits[split]
    starts = np.random.Generator(bits).integers(
      0, len(tokens) - self.block_size, size=self.batch_size
    )[rows]
    positions = starts[:, None] + np.arange(self.block_size + 1)
    windows = tokens[positions].astype(np.int32)
    return {
      'inputs': windows[:, :-1],
      'targets': windows[:, 1:],
      'weights': np.ones((len(starts), self.block_size), np.float32),
    }

  def _one_pass(self, split: str, rows: slice) -> Iterator[Batch]:
    """Yields batches of consecutive windows; padding completes the last one."""
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
    # Parts limit the memory of a memory-mapped split.
    for start in range(0, len(tokens), 1 << 20):
      part = tokens[start : start + (1 << 20)]
      digest.update(part.astype(np.int32).tobytes())
  return digest.hexdigest()[:16]
