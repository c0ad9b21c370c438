"""The text of a run: found, tokenized, split, cut into batches."""

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
TRAIN_SHARE = 0.9  # Of the text; the rest is the validation split.
COUNTED_BATCHES = 16  # Enough to know the most frequent tokens.


def read(
  config: Config,
  directory: pathlib.Path,
  allow_changed: Collection[str] = (),
) -> tuple[Corpus, Tokenizer, Dataset]:
  """The text, its tokenizer, and the batches that are cut from it.

  A run that is in `directory` gets the text and the tokenizer that it began
  with, or an error, but for what is allowed to change; one that starts from
  another run, that one's tokenizer.
  """
  path = directory / VOCABULARY
  spec_of_tokenizer = config.data.tokenizer.to_dict()
  goes_on = path.exists()
  if goes_on and 'data' not in allow_changed:
    recorded = tokenizers.read(path)
    corpus = corpus_lib.find_again(
      config.data.path, recorded['corpus'], recorded['corpus_sha256']
    )
  else:
    corpus = corpus_lib.find(config.data.path, config.data.fallback)
  if goes_on and 'tokenizer' not in allow_changed:
    tokenizer = tokenizers.load(spec_of_tokenizer, path)
  elif config.init_from and not goes_on:
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
  """The tokens of each split: of a large text, memory-mapped.

  Raises:
    UserError: a part of a text has no token, or one beyond the vocabulary; or
      there is no room for the tokens of a large one.
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
    place = cache.directory()
    vocab_size = tokenizer.vocab_size
    tokens |= large_text.tokenize(
      large_ones, encode_pieces, vocab_size, fingerprint, place
    )
  return tokens


class InVocabulary:
  """A `trainers.task.Dataset` of which no token is beyond the vocabulary.

  XLA clamps such an index: the loss would be that of another text.

  Raises, where a batch is asked for:
    UserError: it has such a token.
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
      where = f'data.dataset, in {name} of a batch,'
      _check(where, np.asarray(batch[name]), self._vocab_size)
    return batch


def _check(where: str, tokens: np.ndarray, vocab_size: int) -> None:
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
    strange = tokens[(tokens < 0) | (tokens >= vocab_size)].flat[0]
    raise UserError(
      f'{where} made token {strange}; the vocabulary has 0 to {vocab_size - 1}'
    )


def split(whole: Any) -> dict[str, Any]:
  """Of the text, so that the splits are the same whatever its tokens."""
  num_train = int(len(whole) * TRAIN_SHARE)
  return {'train': whole[:num_train], 'val': whole[num_train:]}


def frequent(
  dataset: Dataset, token_bytes: Sequence[bytes], at_most: int
) -> list[int]:
  """The tokens, or those most frequent in training; in the order of texts.

  Where the vocabulary has more than `at_most`, the first batches are counted.
  """
  tokens = np.arange(len(token_bytes))
  if len(tokens) > at_most:
    count = np.zeros(len(tokens), np.int64)
    for i in range(COUNTED_BATCHES):
      inputs = np.asarray(dataset.train_batch(i, slice(None))['inputs'])
      count += np.bincount(inputs.ravel(), minlength=len(tokens))
    tokens = np.argsort(-count, kind='stable')[:at_most]
  return sorted(tokens.tolist(), key=lambda token: token_bytes[token])


def build_dataset(config: Config, splits: dict[str, np.ndarray]) -> Dataset:
  own = config.data.dataset.to_dict()
  dataset = spec.build(
    'data.dataset',
    own,
    DATASETS,
    splits=splits,
    seed=config.seed,
    batch_size=config.batch_size,
    block_size=config.block_size,
    eval_iters=config.eval_iters,
  )
  if not isinstance(dataset, Dataset):
    raise UserError(
      f'data.dataset.type={own["type"]!r} is not a trainers.task.Dataset: it '
      'must have fingerprint, train_batch and eval_batches'
    )
  return dataset


def _tokenizer_of(source: pathlib.Path, wanted: dict[str, Any]) -> Tokenizer:
  """That of the run in `source`: weights mean nothing with another."""
  theirs = workdir.config_of(source).data.tokenizer.to_dict()
  if theirs != wanted:
    raise UserError(
      f'init_from={source}: its weights are for data.tokenizer={theirs}, and '
      f'this config has {wanted}'
    )
  return tokenizers.load(theirs, source / VOCABULARY)
