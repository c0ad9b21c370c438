"""Text from the trained model."""

import logging
import pathlib

import numpy as np

from nanomoe.data.tokenizer import Tokenizer
from nanomoe.sampling import Generator, Logits, Sampling
from trainers.callbacks import Callback
from trainers.files import write_atomically

log = logging.getLogger(__name__)


class TextSample(Callback):
  """Generates text when training is done: printed, and in a file.

  Args:
    logits: as of `Generator`.
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
    logits: Logits,
    path: pathlib.Path,
    tokenizer: Tokenizer,
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
    self.block_size = block_size
    self.num_tokens = num_tokens
    self.sampling = Sampling(temperature)
    self.seed = seed

  def on_fit_end(self, loop):
    if loop.status != 'done' or not self.num_tokens:
      return
    generate = Generator(self.logits, loop.state.params, self.block_size)
    drawn = generate([self.prompt], self.num_tokens, self.sampling, self.seed)
    text = self.tokenizer.decode(np.concatenate(list(drawn)))
    write_atomically(self.path, text)
    log.info('sample (%d tokens):\n%s', self.num_tokens, text)
