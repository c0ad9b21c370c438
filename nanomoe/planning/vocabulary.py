"""Size of a config's vocabulary, before a run has learned it."""

import json
import pathlib

from nanomoe.config.schema import Config
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import pipeline, tokenizers
from trainers.errors import UserError


def size(config: Config) -> int:
  """Returns the number of tokens in a config's vocabulary.

  A tokenizer that states its size is not given the text. BPE learns at most the
  requested number of tokens, which is the result. Other tokenizers, such as
  `Characters`, read the text as training does.

  Args:
    config: Whole config.

  Raises:
    UserError: The tokenizer cannot be built, or the text cannot be read.
  """
  spec = config.data.tokenizer.to_dict()
  tokenizer = tokenizers.build(spec)
  if spec['type'] == 'BPE':
    if spec.get('file'):
      return _size_of_file(spec['file'])
    return spec.get('vocab_size', 1024)
  if isinstance(tokenizer, tokenizers.Bytes):
    return tokenizer.vocab_size
  corpus = corpus_lib.find(config.data.path, config.data.fallback)
  text = corpus.text if tokenizer.fits_pieces else str(corpus.text)
  tokenizer.fit(pipeline.split(text))
  return tokenizer.vocab_size


def _size_of_file(path: str) -> int:
  where = f'data.tokenizer.file={path!r}'
  try:
    state = json.loads(pathlib.Path(path).read_text(encoding='utf-8-sig'))
    added = [token['id'] for token in state.get('added_tokens') or ()]
    return max([*state['model']['vocab'].values(), *added]) + 1
  except OSError as error:
    raise UserError(f'{where}: {error.strerror}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'{where}: it must be a byte-level tokenizer.json'
    ) from error
