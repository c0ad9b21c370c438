"""Export of a checkpoint: files, verification and model card."""

import json
import pathlib
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import pipeline, tokenizer_files, tokenizers
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.portable import card, classes, model, tensor_files, verify
from nanomoe.run import workdir as workdir_lib
from trainers.runtime import memory

# Characters of the validation split that transformers tokenizes as well.
TEXT_CHARS = 1 << 20
PROMPT_CHARS = 16  # Of the example in the model card.


@runtime_checkable
class Checkpoint(Protocol):
  """Content of a checkpoint, such as `experiment.Restored`.

  Attributes:
    tokenizer: Tokenizer of the run.
    params, model_state: Weights, and state without gradients.
    step: Step of the checkpoint.
  """

  @property
  def tokenizer(self) -> Tokenizer: ...
  @property
  def params(self) -> Any: ...
  @property
  def model_state(self) -> Any: ...
  @property
  def step(self) -> int: ...


def problems(workdir: pathlib.Path, config: Config) -> list[str]:
  """Returns a line for each key that keeps a run from being exported.

  Args:
    workdir: Directory of the run.
    config: Config of the run.
  """
  del workdir
  return classes.problems(config)


def write(
  workdir: pathlib.Path,
  config: Config,
  run: Checkpoint,
  directory: pathlib.Path,
  name: pathlib.Path,
  dtype: str,
) -> dict[str, Any]:
  """Writes and verifies an export.

  Args:
    workdir: Directory of the run.
    config: Config of the run, for which `problems` is empty.
    run: Checkpoint of the run.
    directory: Empty directory to write to.
    name: Directory that the files move to afterwards.
    dtype: Type of the weights in the files.

  Returns:
    The class of the model, and the results of the verification.

  Raises:
    UserError: The files differ from the checkpoint.
  """
  tokenizer, step = run.tokenizer, run.step
  files = tokenizer_files.to_json(tokenizer)
  written = model.trained(run.params, run.model_state)
  del run  # Its arrays are freed with those of `written`.
  config = model.unrolled(config)
  model.write(directory, written, config, dtype, tokenizer.vocab_size)
  workdir_lib.write_json(directory / 'tokenizer.json', files)
  workdir_lib.write_json(
    directory / 'tokenizer_config.json',
    tokenizer_files.tokenizer_config(config.block_size),
  )
  corpus = corpus_of(workdir, config)
  text = pipeline.split(corpus.text)['val']
  num_tokens = verify.same_tokens(directory, tokenizer, text)
  head = str(text[:TEXT_CHARS])
  tokens = tokenizer.encode(head)
  shapes = jax.eval_shape(lambda: written.params)
  read = model.read(directory, config, shapes, written.bias is not None)
  verify.same_weights(written, read, np.dtype(tensor_files.DTYPES[dtype]))
  reference = verify.reference(config, tokenizer.vocab_size, read, tokens)
  del read  # The reference has a copy.
  memory.trim()
  if dtype == 'float32':
    verify.same_logits(written, reference)
  del written  # Transformers needs memory for a copy of its own.
  memory.trim()
  checks: dict[str, Any] = {
    'equal_weights': dtype,
    'equal_token_ids': num_tokens,
  }
  if verify.has_transformers():
    checks |= verify.same_as_transformers(directory, reference, head, tokens)
  hf = classes.find(config)
  assert hf, 'classes.problems is empty'
  facts = facts_of(workdir, corpus, step)
  (directory / 'README.md').write_text(
    card.text(
      name, config, hf.name, shapes, facts, checks, head[:PROMPT_CHARS]
    ),
    encoding='utf-8',
  )
  return {
    'out': str(name),
    'class': hf.name,
    'step': step,
    **checks,
  }


def corpus_of(workdir: pathlib.Path, config: Config) -> corpus_lib.Corpus:
  """Returns the text of a run.

  Args:
    workdir: Directory of the run.
    config: Config of the run.

  Raises:
    UserError: The text cannot be read or has changed.
  """
  recorded = tokenizers.read(workdir / pipeline.VOCABULARY)
  return corpus_lib.find_again(
    config.data.path, recorded['corpus'], recorded['corpus_sha256']
  )


def facts_of(
  workdir: pathlib.Path, corpus: corpus_lib.Corpus, step: int
) -> dict[str, Any]:
  """Returns the facts about a run that the model card shows, by name.

  Args:
    workdir: Directory of the run.
    corpus: Text of the run.
    step: Step of the checkpoint.
  """
  return {
    'Corpus': f'{corpus.name} (SHA-256 `{corpus.fingerprint[:16]}`)',
    'Step': step,
    **_losses(workdir),
  }


def _losses(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the losses in result.json that the model card shows."""
  try:
    result = json.loads((workdir / 'result.json').read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return {}
  names = {
    'best_val_loss': 'Best validation loss, nats per token',
    'train_cross_entropy': 'Last training loss, nats per token',
  }
  return {
    title: f'{result[name]:.4f}'
    for name, title in names.items()
    if isinstance(result.get(name), float)
  }
