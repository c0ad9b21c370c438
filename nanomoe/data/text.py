"""The text of a run: found, tokenized, split, cut into batches."""

from collections.abc import Collection, Sequence
import pathlib
from typing import Any

import numpy as np

from nanomoe import workdir
from nanomoe.config import Config
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import tokenizers
from nanomoe.data.corpus import Corpus
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.data.windows import Windows
from trainers import spec
from trainers.errors import UserError
from trainers.task import Dataset

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
    tokenizer.fit(split(corpus.text))
  try:
    tokens = {
      name: tokenizer.encode(text) for name, text in split(corpus.text).items()
    }
  except UserError as error:
    where = f'init_from={config.init_from}: ' if config.init_from else ''
    raise UserError(
      f'{where}{corpus.name} does not fit the vocabulary: {error}'
    ) from error
  return corpus, tokenizer, build_dataset(config, tokens)


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
