"""Comparison of an export with its checkpoint, and with transformers."""

import contextlib
import functools
import importlib
import importlib.util
import io
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers as library

from nanomoe.config.schema import Config
from nanomoe.data.large_text import LargeText
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.model.stack import block_name
from nanomoe.model.transformer import Block
from nanomoe.portable.model import Trained
from nanomoe.sampling import Generator, Sampling
from nanomoe.task import LanguageModel, build_task
from trainers.errors import UserError

TOLERANCE = 1e-4  # Largest difference of logits, in float32.
NUM_GREEDY = 200  # Greedy tokens that must be equal.
BATCH_SIZES = 1, 7
_PROMPT = 16  # Tokens of a prompt.


class Reference(NamedTuple):
  """Model of an export, with float32 products.

  Attributes:
    task: Language model without stacked blocks.
    trained: Pair of params and model_state.
    tokens: Tokens of the validation split.
    block_size: Number of tokens in a window.
  """

  task: LanguageModel
  trained: tuple[Any, Any]
  tokens: np.ndarray
  block_size: int

  def logits(self, tokens: np.ndarray) -> np.ndarray:
    """Returns the logits of windows, `[batch, time, vocab]`."""
    tokens = np.asarray(tokens, np.int32)
    return np.asarray(_logits(self.task, self.trained, tokens))

  def windows(self, batch_size: int) -> np.ndarray:
    """Returns windows of the validation split, `[batch, time]`."""
    time = min(self.block_size, len(self.tokens) // 2)
    last = len(self.tokens) - time
    starts = np.linspace(0, last, batch_size).astype(int)
    return np.stack([self.tokens[s : s + time] for s in starts])


# Compiled once for each shape of the tokens.
@functools.partial(jax.jit, static_argnums=0)
def _logits(task: LanguageModel, trained: Any, tokens: jax.Array) -> jax.Array:
  return task.logits(trained, tokens)[0]


def _on_device(model: Trained) -> tuple[Any, Any]:
  """Returns the pair of params and model_state of weights."""
  state = {} if model.bias is None else {'bias': jnp.asarray(model.bias)}
  return jax.tree.map(jnp.asarray, model.params), state


def reference(
  config: Config, vocab_size: int, model: Trained, tokens: np.ndarray
) -> Reference:
  """Returns the model of an export, with float32 products.

  Args:
    config: Config of the run, without stacked blocks.
    vocab_size: Number of tokens of the tokenizer.
    model: Weights in the files.
    tokens: Tokens of the validation split.
  """
  config = config.copy_and_resolve_references()
  config.precision = 'float32'
  return Reference(
    build_task(config, vocab_size),
    _on_device(model),
    tokens,
    config.block_size,
  )


def same_weights(written: Trained, read: Trained, dtype: Any) -> None:
  """Compares the weights in the files, bitwise.

  Args:
    written: Weights of the checkpoint.
    read: Weights in the files.
    dtype: Type of the weights in the files.

  Raises:
    UserError: A weight differs.
  """
  for path, x in written.arrays.items():
    expected = x.astype(dtype).astype(np.float32)
    if not path.endswith('router/noise') and not np.array_equal(
      expected.view(np.uint32), read.arrays[path].view(np.uint32)
    ):
      raise UserError(f'the export failed: {path} differs in the files')
  one, other = written.bias, read.bias
  if one is not None and (other is None or not np.array_equal(one, other)):
    raise UserError('the export failed: router biases differ in the files')


def same_logits(written: Trained, model: Reference) -> None:
  """Compares the logits of a model of float32 weights, bitwise.

  Args:
    written: Weights of the checkpoint.
    model: Model with the weights in the files.

  Raises:
    UserError: A logit differs.
  """
  tokens = model.windows(1)
  checkpoint = model._replace(trained=_on_device(written))
  if not np.array_equal(checkpoint.logits(tokens), model.logits(tokens)):
    raise UserError('the export failed: the logits of the files differ')


def same_tokens(
  directory: pathlib.Path, tokenizer: Tokenizer, text: str | LargeText
) -> int:
  """Compares the token ids of a text with those of tokenizer.json.

  Args:
    directory: Directory of the export.
    tokenizer: Tokenizer of the run.
    text: Text to tokenize.

  Returns:
    The number of tokens.

  Raises:
    UserError: Token ids differ, or the ids do not decode to the text.
  """
  written = library.Tokenizer.from_file(str(directory / 'tokenizer.json'))
  num_tokens = 0
  for piece, ids in tokenizer.encode_pieces(text):
    try:
      found = written.encode(piece, add_special_tokens=False).ids
    except Exception as error:  # The library raises no more specific class.
      raise UserError(
        f'the export failed: tokenizer.json cannot encode the text ({error})'
      ) from error
    if not np.array_equal(found, ids):
      raise UserError(
        'the export failed: tokenizer.json has other token ids after token '
        f'{num_tokens:,}'
      )
    if written.decode(found, skip_special_tokens=False) != piece:
      raise UserError(
        'the export failed: tokenizer.json decodes to another text after token '
        f'{num_tokens:,}'
      )
    num_tokens += len(ids)
  return num_tokens


def has_transformers() -> bool:
  """Returns whether transformers and torch are installed."""
  return all(
    importlib.util.find_spec(name) for name in ('torch', 'transformers')
  )


def same_as_transformers(
  directory: pathlib.Path, model: Reference, text: str, ids: np.ndarray
) -> dict[str, Any]:
  """Compares logits, greedy text and token ids with transformers.

  Args:
    directory: Directory of the export.
    model: Model with the weights in the files.
    text: Text of the validation split.
    ids: Token ids of that text.

  Returns:
    The version of transformers, `max_logit_difference` and `greedy_tokens`.

  Raises:
    UserError: They differ; the line names the first layer that does.
  """
  torch = importlib.import_module('torch')  # Both are optional.
  transformers = importlib.import_module('transformers')

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      other, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
      )
      tokenizer = transformers.AutoTokenizer.from_pretrained(
        directory, trust_remote_code=False, local_files_only=True
      )
  except Exception as error:  # The library raises classes of its own.
    raise UserError(
      f'the export failed: transformers cannot load it ({error!r})'
    ) from error
  for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
    if names := sorted(map(str, loaded[problem])):
      raise UserError(f'the export failed: {problem}: {", ".join(names[:5])}')
  other.eval()
  found = tokenizer(text, add_special_tokens=False)['input_ids']
  if not np.array_equal(found, ids):
    raise UserError('the export failed: transformers has other token ids')

  def compare(tokens, ours, **padding):
    with torch.no_grad():
      theirs = other(torch.as_tensor(tokens, dtype=torch.long), **padding)
    mask = np.asarray(padding.get('attention_mask', np.ones(tokens.shape)))
    # Later logits are those of padding of the vocabulary.
    logits = theirs.logits.numpy()[..., : ours.shape[-1]]
    return float(np.max(np.abs(logits - ours)[mask > 0], initial=0.0))

  worst = 0.0
  for batch_size in BATCH_SIZES:
    tokens = model.windows(batch_size)
    ours = model.logits(tokens)
    worst = max(worst, compare(tokens, ours))
    for side in (1, -1):  # Padding on the right, and on the left.
      shift = [i % 3 + 1 for i in range(batch_size)]
      padded, shifted = (
        np.stack(
          [np.roll(row, n, axis=0) for row, n in zip(x, shift, strict=True)]
        )
        if side < 0
        else x
        for x in (tokens, ours)
      )
      place = np.arange(tokens.shape[1])
      mask = np.stack(
        [place >= n if side < 0 else place < tokens.shape[1] - n for n in shift]
      ).astype(np.int64)
      padded = np.where(mask, padded, 0)
      worst = max(
        worst,
        compare(padded, shifted, attention_mask=torch.as_tensor(mask)),
      )
  if not worst <= TOLERANCE:
    layer = _first_difference(other, model)
    raise UserError(
      f'the export failed: the logits of transformers differ by {worst:.2g}; '
      f'at most {TOLERANCE} is allowed. {layer}'
    )
  prompts = [
    model.tokens[s : s + _PROMPT].tolist()
    for s in (0, max(len(model.tokens) // 2 - _PROMPT, 0))
  ]
  size = max(map(len, prompts)) + NUM_GREEDY
  generator = Generator(model.task.logits, model.trained, size)
  drawn = generator(prompts, NUM_GREEDY, Sampling(temperature=0.0), 0)
  ours = np.stack(list(drawn), axis=1)
  for prompt, row in zip(prompts, ours, strict=True):
    ids = torch.as_tensor([prompt], dtype=torch.long)
    with torch.no_grad():
      out = other.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_GREEDY,
        do_sample=False,
        pad_token_id=0,
      )
    theirs = out[0, len(prompt) :].numpy()
    if not np.array_equal(theirs, row):
      at = int(np.argmax(theirs != row[: len(theirs)]))
      raise UserError(
        f'the export failed: greedy token {at + 1} differs in transformers'
      )
  return {
    'transformers': transformers.__version__,
    'max_logit_difference': worst,
    'greedy_tokens': NUM_GREEDY,
  }


def _first_difference(other: Any, model: Reference) -> str:
  """Returns a sentence that names the first layer whose output differs."""
  torch = importlib.import_module('torch')

  tokens = model.windows(1)
  with torch.no_grad():
    theirs = other(
      torch.as_tensor(tokens, dtype=torch.long), output_hidden_states=True
    ).hidden_states
  params, state = model.trained
  _, seen = model.task.model.apply(
    {'params': params},
    jnp.asarray(tokens, jnp.int32),
    jnp.ones(tokens.shape, bool),
    bias=state.get('bias'),
    train=False,
    capture_intermediates=lambda module, _: isinstance(module, Block),
    mutable=['intermediates'],
  )
  for i in range(len(theirs) - 2):
    (output,) = seen['intermediates'][block_name(i)]['__call__']
    difference = float(
      np.max(np.abs(np.asarray(output[0]) - theirs[i + 1].numpy()))
    )
    if difference > TOLERANCE:
      return f'The first layer that differs is layer {i}, by {difference:.2g}'
  return 'The first layer that differs is the last one, or the output layer'
