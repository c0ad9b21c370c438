"""Text from the trained model."""

from collections.abc import Callable
import functools
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from nanomoe.data.tokenizers import Characters
from nanomoe.generate import generate
from trainers.callbacks import Callback
from trainers.files import write_atomically

log = logging.getLogger(__name__)


class TextSample(Callback):
  """Generates text when training is done: printed, and in a file.

  Args:
    logits: (params, tokens) -> [batch, time, vocab].
    path: of the file.
    tokenizer: of the run.
    prompt: tokens that the text continues: at least one.
    block_size: of the model.
    num_tokens: how many to generate; 0: none.
    temperature: of the sampling.
    seed: of the sampling.
  """

  def __init__(
    self,
    logits: Callable[[Any, jax.Array], jax.Array],
    path: pathlib.Path,
    tokenizer: Characters,
    prompt: list[int],
    block_size: int,
    num_tokens: int,
    temperature: float,
    seed: int,
  ):
    self.logits = logits
    self.path = path
    self.tokenizer = tokenizer
    self.prompt = prompt
    self.seed = seed
    self.num_tokens = num_tokens
    self.block_size = block_size
    self.temperature = temperature

  def on_fit_end(self, loop):
    if loop.status != 'done' or not self.num_tokens:
      return

    @jax.jit
    def sample(params, prompt, key):
      return generate(
        functools.partial(self.logits, params),
        prompt,
        key,
        num_tokens=self.num_tokens,
        block_size=self.block_size,
        temperature=self.temperature,
      )

    prompt = jnp.asarray([self.prompt], jnp.int32)
    key = jax.random.key(self.seed)
    [tokens] = jax.device_get(sample(loop.state.params, prompt, key))
    text = self.tokenizer.decode(tokens)
    write_atomically(self.path, text)
    log.info('sample (%d tokens):\n%s', len(tokens), text)
