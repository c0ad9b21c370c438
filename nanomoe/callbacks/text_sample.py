"""Text from the trained model."""

import functools
import logging

import jax
import jax.numpy as jnp

from nanomoe.data.tokenizers import Characters
from nanomoe.generate import generate
from trainers.callbacks import Callback
from trainers.files import write_atomically

log = logging.getLogger(__name__)


class TextSample(Callback):
  """Generates text when training is done: printed, and in sample.txt.

  Args:
    tokenizer: of the run.
    prompt: tokens that the text continues: at least one.
    block_size: of the model.
    num_tokens: how many to generate; 0: none.
    temperature: of the sampling.
    seed: of the sampling.
  """

  def __init__(
    self,
    tokenizer: Characters,
    prompt: list[int],
    block_size: int,
    num_tokens: int,
    temperature: float,
    seed: int,
  ):
    self.tokenizer = tokenizer
    self.prompt = prompt
    self.seed = seed
    self.num_tokens = num_tokens
    self.settings = dict(
      num_tokens=num_tokens, block_size=block_size, temperature=temperature
    )

  def on_fit_end(self, loop):
    if loop.status != 'done' or not self.num_tokens:
      return

    @jax.jit
    def sample(params, prompt, key):
      logits = functools.partial(loop.task.logits, params)
      return generate(logits, prompt, key, **self.settings)

    tokens = sample(
      loop.state.params,
      jnp.asarray([self.prompt], jnp.int32),
      jax.random.key(self.seed),
    )
    text = self.tokenizer.decode(jax.device_get(tokens)[0])
    write_atomically(loop.workdir / 'sample.txt', text)
    log.info('sample (%d tokens):\n%s', len(tokens[0]), text)
