"""Texts, checkpoints and records of a run, as the figures need them."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from jaxtyping import Int
import numpy as np

import nanomoe
from nanomoe.config.schema import Config
from nanomoe.data import corpus, pipeline, tokenizers
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.inspection import figures
from nanomoe.inspection.figures import Sample
from nanomoe.inspection.trace import Trace, join, trace
from nanomoe.moe.dispatch import registry
from nanomoe.run.history import History, Series
from nanomoe.task import LanguageModel
from trainers.checkpoint import reader
from trainers.errors import UserError

# Characters that are read for each token; few texts need more.
_CHARACTERS = 16


def validation_split(config: Config, workdir: pathlib.Path) -> str | LargeText:
  """Returns the validation split of the text of a run.

  Args:
    config: Config of the run.
    workdir: Directory of the run.

  Raises:
    UserError: The text was not found, or it has changed.
  """
  recorded = tokenizers.read(workdir / pipeline.VOCABULARY)
  found = corpus.find_again(
    config.data.path, recorded['corpus'], recorded['corpus_sha256']
  )
  return pipeline.split(found.text)['val']


def tokens_of(
  name: str, text: str | LargeText, tokenizer: Tokenizer, num_tokens: int
) -> Int[np.ndarray, ' tokens']:
  """Returns the first tokens of a text.

  Args:
    name: Name of the text, for errors.
    text: The text.
    tokenizer: Tokenizer of the run.
    num_tokens: Largest number of tokens.

  Raises:
    UserError: The text has no tokens, or a part of it has no token.
  """
  # Characters behind the last token need no tokens of their own.
  size, limit = num_tokens, min(_CHARACTERS * num_tokens, len(text))
  try:
    tokens = tokenizer.encode(str(text[:size]))
    while len(tokens) < num_tokens and size < limit:
      size = min(2 * size, limit)
      tokens = tokenizer.encode(str(text[:size]))
  except UserError as error:
    raise UserError(f'--text={name}: {error}') from error
  except UnicodeEncodeError as error:
    raise UserError(f'--text={name}: it is not UTF-8') from error
  if not len(tokens):
    raise UserError(f'--text={name}: the text has no tokens')
  return tokens[:num_tokens]


class Tracer:
  """Function from the weights of a checkpoint to the routing of some texts.

  Each text starts a window of its own.

  Args:
    task: Task of the run.
    config: Config of the run.
    texts: Tokens of each text.
  """

  def __init__(
    self, task: LanguageModel, config: Config, texts: Sequence[np.ndarray]
  ):
    self._task, self._texts = task, texts
    has_capacity = registry.eval_dispatch(config.moe) == 'capacity'
    self._arguments = {
      'block_size': config.block_size,
      'batch_size': config.batch_size,
      'capacity_factor': config.moe.capacity_factor if has_capacity else None,
    }

  def __call__(self, params: Any, model_state: Any) -> Trace:
    """Returns the routing of all texts."""
    return join(
      [
        trace(self._task, params, model_state, tokens, **self._arguments)
        for tokens in self._texts
      ]
    )


def sample(
  tokens: Mapping[str, Sequence[np.ndarray]], tokenizer: Tokenizer
) -> Sample:
  """Returns the labels of the texts, and the label of each token.

  Args:
    tokens: Tokens of each text, by label.
    tokenizer: Tokenizer of the run.
  """
  sizes = [sum(map(len, texts)) for texts in tokens.values()]
  text = np.repeat(np.arange(len(sizes)), sizes)
  return Sample(list(tokens), text, tokenizer.token_bytes())


def steps_before(workdir: pathlib.Path, step: int) -> list[int]:
  """Returns steps of checkpoints of a run before `step`, as many as are shown.

  They are spread evenly, with the first and the last.
  """
  steps = reader.steps_in(workdir / 'checkpoints')
  steps = [other for other in steps if other < step]
  return [steps[i] for i in figures.spread(len(steps), figures.MAX_STEPS)]


def loads(run: History) -> Series | None:
  """Returns the recorded loads of training, or None without a record."""
  name = 'train/expert_load'
  return run.series(name) if name in run.names() else None


def about(
  run: History,
  step: int,
  tokens: Mapping[str, Sequence[np.ndarray]],
  found: Trace,
) -> dict[str, Any]:
  """Returns facts about the run, the checkpoint and the texts.

  Args:
    run: History of the run.
    step: Step of the checkpoint.
    tokens: Tokens of each text, by label.
    found: Routing of these tokens.
  """
  config = run.config
  return {
    'nanomoe': nanomoe.__version__,
    'workdir': str(run.workdir),
    'is_running': run.is_running,
    'step': step,
    'num_train_steps': config.num_train_steps,
    'weights': config.eval_weights,
    'router': config.moe.router.type,
    'top_k': config.moe.top_k,
    'num_experts': found.num_experts,
    'num_layers': config.model.num_layers,
    'layers': list(found.layers),
    'dispatch': registry.eval_dispatch(config.moe),
    'tokenizer': config.data.tokenizer.type,
    'block_size': config.block_size,
    'batch_size': config.batch_size,
    'texts': [
      {'name': label, 'num_tokens': sum(map(len, texts))}
      for label, texts in tokens.items()
    ],
    'num_tokens': len(found.tokens),
  }
