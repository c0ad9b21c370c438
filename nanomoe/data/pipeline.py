"""Pipeline from the text of a run to batches: read, split, tokenize, cut."""

from collections.abc import Collection, Iterator, Mapping, Sequence
import pathlib
from typing import Any

from jaxtyping import Integer
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import large_text, tokenizers
from nanomoe.data.corpus import Corpus
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.data.windows import ShortSplit, Windows
from nanomoe.run import cache, workdir
from trainers import spec
from trainers.errors import UserError
from trainers.task import Batch, Dataset

DATASETS = {'Windows': Windows}
VOCABULARY = 'vocabulary.json'
WHOLE = 'whole'  # Split of a text that is evaluated as a whole.
TRAIN_SHARE = 0.9  # Share of the training split; the rest is for validation.
COUNTED_BATCHES = 16  # Batches that estimate the frequencies of tokens.


def read(
  config: Config,
  directory: pathlib.Path,
  allow_changed: Collection[str] = (),
) -> tuple[Corpus, Tokenizer, Dataset]:
  """Returns the text of a run, its tokenizer and its dataset.

  A resumed run gets the text and the tokenizer that it began with. A run with
  init_from gets the tokenizer of its source.

  Args:
    config: Config of the run.
    directory: Workdir of the run. The run resumes if its vocabulary is there.
    allow_changed: 'data' and 'tokenizer' allow another text and tokenizer.

  Raises:
    UserError: The text or the tokenizer cannot be read or has changed, or the
      text does not fit the tokenizer or the dataset.
  """
  path = directory / VOCABULARY
  spec_of_tokenizer = config.data.tokenizer.to_dict()
  resumes = path.exists()
  if resumes and 'data' not in allow_changed:
    recorded = tokenizers.read(path)
    corpus = corpus_lib.find_again(
      config.data.path, recorded['corpus'], recorded['corpus_sha256']
    )
  else:
    corpus = corpus_lib.find(config.data.path, config.data.fallback)
  if resumes and 'tokenizer' not in allow_changed:
    tokenizer = tokenizers.load(spec_of_tokenizer, path)
  elif config.init_from and not resumes:
    tokenizer = _tokenizer_of(pathlib.Path(config.init_from), spec_of_tokenizer)
  else:
    tokenizer = tokenizers.build(spec_of_tokenizer)
    text = corpus.text if tokenizer.fits_pieces else str(corpus.text)
    tokenizer.fit(split(text))
  try:
    tokens = tokenize(split(corpus.text), tokenizer, corpus.fingerprint)
  except UserError as error:
    where = f'init_from={config.init_from}: ' if config.init_from else ''
    raise UserError(
      f'{where}{corpus.name} does not fit the vocabulary: {error}'
    ) from error
  try:
    dataset = build_dataset(config, tokens)
  except ShortSplit as error:
    path = config.data.path
    where = f'data.path={path!r}' if path else f'the text {corpus.name}'
    raise UserError([f'{where}: {line}' for line in error.problems]) from error
  return corpus, tokenizer, InVocabulary(dataset, tokenizer.vocab_size)


def tokenize(
  splits: Mapping[str, str | LargeText], tokenizer: Tokenizer, fingerprint: str
) -> dict[str, Integer[np.ndarray, ' length']]:
  """Returns the tokens of each split; those of a large text are memory-mapped.

  Args:
    splits: Text of each split.
    tokenizer: Tokenizer with a vocabulary.
    fingerprint: Fingerprint of the text.

  Raises:
    UserError: A part of a text has no token, a token is outside the vocabulary,
      or the tokens of a large text cannot be written.
  """

  def check(tokens: np.ndarray) -> np.ndarray:
    _check('data.tokenizer', tokens, tokenizer.vocab_size)
    return tokens

  def encode_pieces(text: str | LargeText):
    for piece, tokens in tokenizer.encode_pieces(text):
      yield piece, check(tokens)

  large_ones = {k: v for k, v in splits.items() if isinstance(v, LargeText)}
  small_ones = {k: v for k, v in splits.items() if isinstance(v, str)}
  tokens = {n: check(tokenizer.encode(t)) for n, t in small_ones.items()}
  if large_ones:
    directory = cache.directory()
    vocab_size = tokenizer.vocab_size
    tokens |= large_text.tokenize(
      large_ones, encode_pieces, vocab_size, fingerprint, directory
    )
  return tokens


class InVocabulary:
  """Dataset wrapper that checks that each token is in the vocabulary.

  XLA clamps an index that is out of range, so an invalid token would change the
  loss silently. Each method that makes a batch raises `UserError` if the batch
  has an invalid token.

  Args:
    dataset: A `trainers.task.Dataset`.
    vocab_size: Number of tokens in the vocabulary.
  """

  def __init__(self, dataset: Dataset, vocab_size: int):
    self._dataset = dataset
    self._vocab_size = vocab_size
    self.fingerprint = dataset.fingerprint

  def train_batch(self, index: int, rows: slice) -> Batch:
    return self._checked(self._dataset.train_batch(index, rows))

  def eval_batches(self, split: str, rows: slice) -> Iterator[Batch]:
    return map(self._checked, self._dataset.eval_batches(split, rows))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._dataset, name)

  def _checked(self, batch: Batch) -> Batch:
    for name in ('inputs', 'targets'):
      where = f'data.dataset: batch[{name!r}]'
      _check(where, np.asarray(batch[name]), self._vocab_size)
    return batch


def _check(where: str, tokens: np.ndarray, vocab_size: int) -> None:
  """Raises UserError if a token is not in [0, vocab_size)."""
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
    invalid = tokens[(tokens < 0) | (tokens >= vocab_size)].flat[0]
    raise UserError(
      f'{where} has token {invalid}, which is not in the vocabulary; tokens '
      f'must be 0 to {vocab_size - 1}'
    )


def split(whole: Any) -> dict[str, Any]:
  """Returns the splits of a text, which do not depend on the tokenizer."""
  num_train = int(len(whole) * TRAIN_SHARE)
  return {'train': whole[:num_train], 'val': whole[num_train:]}


def frequent(
  dataset: Dataset, token_bytes: Sequence[bytes], at_most: int
) -> list[int]:
  """Returns the most frequent tokens of training, in the order of their bytes.

  A vocabulary of at most `at_most` tokens is returned whole. Otherwise the
  tokens in the first `COUNTED_BATCHES` batches are counted.

  Args:
    dataset: Dataset of the run.
    token_bytes: UTF-8 of each token.
    at_most: Largest number of tokens to return.
  """
  tokens = np.arange(len(token_bytes))
  if len(tokens) > at_most:
    count = np.zeros(len(tokens), np.int64)
    for i in range(COUNTED_BATCHES):
      inputs = np.asarray(dataset.train_batch(i, slice(None))['inputs'])
      count += np.bincount(inputs.ravel(), minlength=len(tokens))
    tokens = np.argsort(-count, kind='stable')[:at_most]
  return sorted(tokens.tolist(), key=lambda token: token_bytes[token])


def whole(
  text: str | LargeText, tokenizer: Tokenizer, config: Config, fingerprint: str
) -> Windows:
  """Returns a dataset that evaluates a whole text, as its split `WHOLE`.

  Args:
    text: Text to evaluate.
    tokenizer: Tokenizer of the run.
    config: Config of the run.
    fingerprint: Fingerprint of the text.

  Raises:
    UserError: A part of the text has no token, or it has less than two tokens.
  """
  return Windows(
    tokenize({WHOLE: text}, tokenizer, fingerprint),
    seed=config.seed,
    batch_size=config.batch_size,
    block_size=config.block_size,
    eval_iters=0,
  )


def build_dataset(config: Config, splits: dict[str, np.ndarray]) -> Dataset:
  """Returns the dataset that config.data.dataset describes.

  Args:
    config: Config of the run.
    splits: Tokens of each split, `[length]`.

  Raises:
    UserError: The type or an argument is wrong, or the type is not a Dataset.
  """
  dataset_spec = config.data.dataset.to_dict()
  dataset = spec.build(
    'data.dataset',
    dataset_spec,
    DATASETS,
    splits=splits,
    seed=config.seed,
    batch_size=config.batch_size,
    block_size=config.block_size,
    eval_iters=config.eval_iters,
  )
  if not isinstance(dataset, Dataset):
    raise UserError(
      f'data.dataset.type={dataset_spec["type"]!r}: it is not a '
      'trainers.task.Dataset; it must have fingerprint, train_batch and '
      'eval_batches'
    )
  return dataset


def _tokenizer_of(source: pathlib.Path, requested: dict[str, Any]) -> Tokenizer:
  """Returns the tokenizer of the run in `source`, which its weights need.

  Raises:
    UserError: The config requests another tokenizer.
  """
  recorded = workdir.config_of(source).data.tokenizer.to_dict()
  if recorded != requested:
    raise UserError(
      f'init_from={source}: its weights need data.tokenizer={recorded}; this '
      f'config has data.tokenizer={requested}'
    )
  return tokenizers.load(recorded, source / VOCABULARY)
