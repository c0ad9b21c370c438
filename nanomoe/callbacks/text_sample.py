"""Text from the model."""

import logging
import pathlib

import numpy as np

from nanomoe.data.tokenizer import Tokenizer
from nanomoe.sampling import Generator, Logits, Sampling
from trainers.callbacks import Callback
from trainers.files import write_atomically

log = logging.getLogger(__name__)


class TextSample(Callback):
  """Generates text at chosen steps and after the last one.

  All of it is shown by TensorBoard; the last is printed, and in a file. List
  it after Checkpoints: what is trained is then safe.

  Args:
    logits: as of `Generator`.
    path: of the file.
    tokenizer: of the run.
    prompt: tokens that the text continues: at least one.
    block_size: of the model.
    every_steps: how often, beside the last step; 0: then alone.
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
    every_steps: int,
    num_tokens: int,
    temperature: float,
    seed: int,
  ):
    self.path = path
    self.tokenizer = tokenizer
    self.prompt = prompt
    self.every_steps = every_steps
    self.num_tokens = num_tokens
    self.sampling = Sampling(temperature)
    self.seed = seed
    self._generate = Generator(logits, None, block_size)

  def on_train_step_end(self, loop):
    last = loop.step == loop.num_train_steps or loop.status == 'done'
    due = self.every_steps and loop.step % self.every_steps == 0
    running = loop.status in ('running', 'done')
    if not self.num_tokens or not running or not (due or last):
      return
    with loop.clock.phase('sample'):
      text = self._text(loop)
    # Indented, Markdown takes it for code, and leaves its lines alone.
    code = ''.join(f'    {line}\n' for line in text.split('\n'))
    loop.writer.write_texts(loop.step, {'sample': code})
    loop.writer.flush()
    if last:
      try:
        write_atomically(self.path, text)
      except OSError as error:  # It is printed too.
        log.warning('%s could not be written: %s', self.path, error)
      log.info('sample (%d tokens):\n%s', self.num_tokens, text)

  def _text(self, loop) -> str:
    self._generate.trained = loop.eval_params, loop.state.model_state
    drawn = []
    for token in self._generate(
      [self.prompt], self.num_tokens, self.sampling, self.seed
    ):
      drawn.append(token)
      loop.poll()
    self._generate.trained = None  # They are donated at the next step.
    return self.tokenizer.decode(np.concatenate(drawn))
