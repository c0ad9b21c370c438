"""Export of a checkpoint for llama.cpp: file, verification and model card."""

import pathlib
from typing import Any

import jax
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.data import pipeline, tokenizers
from nanomoe.portable import (
  card,
  exporter,
  gguf_model,
  gguf_tokenizer,
  model,
  verify,
)
from nanomoe.portable.exporter import Checkpoint

FILE = 'model.gguf'


def problems(workdir: pathlib.Path, config: Config) -> list[str]:
  """Returns a line for each property of a run that llama.cpp lacks.

  Args:
    workdir: Directory of the run.
    config: Config of the run.

  Raises:
    UserError: The vocabulary is damaged.
  """
  lines, spec = [], config.data.tokenizer.to_dict()
  if spec['type'] in tokenizers.TOKENIZERS:
    tokenizer = tokenizers.load(spec, workdir / pipeline.VOCABULARY)
    lines += gguf_tokenizer.problems(tokenizer)
  return lines + gguf_model.problems(config)


def write(
  workdir: pathlib.Path,
  config: Config,
  run: Checkpoint,
  directory: pathlib.Path,
  name: pathlib.Path,
  dtype: str,
) -> dict[str, Any]:
  """Writes and verifies an export for llama.cpp.

  Args:
    workdir: Directory of the run.
    config: Config of the run, for which `problems` is empty.
    run: Checkpoint of the run.
    directory: Empty directory to write to.
    name: Directory that the files move to afterwards.
    dtype: Type of the weights in the file.

  Returns:
    The architecture of the model, and the results of the verification.

  Raises:
    UserError: The file differs from the checkpoint.
  """
  num_tokens = run.tokenizer.vocab_size
  written, config = gguf_model.without_padding(
    model.trained(run.params, run.model_state),
    model.unrolled(config),
    num_tokens,
  )
  metadata = {
    **gguf_model.fields(config, num_tokens, dtype),
    **gguf_tokenizer.fields(gguf_tokenizer.vocabulary(run.tokenizer)),
  }
  path = directory / FILE
  gguf_model.write(path, written, config, metadata, dtype)
  shapes = jax.eval_shape(lambda: written.params)
  read, found = gguf_model.read(path, config, shapes, metadata)
  corpus = exporter.corpus_of(workdir, config)
  text = pipeline.split(corpus.text)['val']
  num_same = gguf_tokenizer.same_tokens(found, run.tokenizer, text)
  head = str(text[: exporter.TEXT_CHARS])
  rounded = gguf_model.rounded(written, config, dtype)
  verify.same_weights(rounded, read, np.dtype(np.float32))
  tokens = run.tokenizer.encode(head)
  reference = verify.reference(config, num_tokens, read, tokens)
  verify.same_logits(rounded, reference)
  checks = {'equal_weights': dtype, 'equal_token_ids': num_same}
  architecture = gguf_model.architecture(config)
  (directory / 'README.md').write_text(
    card.text(
      name,
      config,
      architecture,
      written.params,
      exporter.facts_of(workdir, corpus, run.step),
      checks,
      head[: exporter.PROMPT_CHARS],
      'gguf',
    ),
    encoding='utf-8',
  )
  return {
    'out': str(name),
    'architecture': architecture,
    'step': run.step,
    **checks,
  }
