"""Command that continues prompts with a trained model."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import logging
import pathlib
import sys
from typing import Any

from absl import flags

from nanomoe.config import home, schema, validation
from nanomoe.config import overrides as config_lib
from nanomoe.data import corpus
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.run import backend, cli, terminal, trusted_imports
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError

log = logging.getLogger('nanomoe.generate')

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.generate --workdir=DIR --prompt='ROMEO:'

Prints the prompt and its continuation on standard output, token by token.
"""
_FLAGS = flags.FlagValues()
_WORKDIR = cli.define_workdir(_FLAGS)
_PROMPT = flags.DEFINE_multi_string(
  'prompt',
  ['\n'],
  "Text to continue. A new line is --prompt=$'one\\ntwo' in bash and zsh. It "
  'may be given several times.',
  flag_values=_FLAGS,
)
# Numbers have the syntax of config keys: 1e3 is an integer too.
NUMBERS = {
  'num_tokens': (500, schema.Field(int, 'Number of tokens to generate', 0)),
  'temperature': (
    0.8,
    schema.Field(
      float, 'Divisor of the logits; 0 takes the likeliest token', 0
    ),
  ),
  'top_k': (
    0,
    schema.Field(int, 'Number of likeliest tokens to draw from; 0: all', 0),
  ),
  'top_p': (
    1.0,
    schema.Field(
      float,
      'Probability that the likeliest tokens to draw from make up; 1: all',
      0,
      most=1,
    ),
  ),
  'seed': (0, schema.Field(int, 'Random seed of the draws', 0, 2**32)),
}
for _name, (_default, _field) in NUMBERS.items():
  flags.DEFINE_string(
    _name,
    str(_default),
    f'{_field.meaning}; {_field.allowed}.',
    flag_values=_FLAGS,
  )
_STEP = cli.define_step(_FLAGS)
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)


def generate(
  workdir: str | pathlib.Path,
  prompts: Sequence[str],
  *,
  num_tokens: int = 500,
  temperature: float = 0.8,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  step: str | int = 'best',
  allow_imports: Collection[str] = (),
) -> Iterator[list[str]]:
  """Yields the next piece of each continuation, `num_tokens` times.

  A piece is '' while a character is incomplete: a token may be part of one.

  Args:
    workdir: Directory of the run.
    prompts: Texts to continue.
    num_tokens: Number of tokens to generate.
    temperature: Divisor of the logits; 0 takes the most likely token.
    top_k: Number of most likely tokens to draw from; 0 means all.
    top_p: Probability mass of the most likely tokens to draw from; 1 means all.
    seed: Random seed of the draws.
    step: Step of the checkpoint: a number, 'best' or 'latest'.
    allow_imports: Import paths that the config of the run may name.

  Raises:
    UserError: A number is out of its range (see `NUMBERS`), there is no such
      run or checkpoint, the run names code that is not in `allow_imports`, a
      prompt is empty or has an unknown character, or the model is not causal.
      It is raised before the first piece.
  """
  numbers = checked(
    num_tokens=num_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    seed=seed,
  )
  workdir = pathlib.Path(home.expand(str(workdir), '--workdir'))
  config = workdir_lib.config_of(workdir)
  trusted_imports.check(
    trusted_imports.paths(config.to_dict(), trusted_imports.OF_A_MODEL),
    allow_imports,
  )
  prompts = checked_prompts(prompts)

  backend.start()
  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.model import build  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.sampling import Generator  # noqa: PLC0415

  if reason := build.generation_problem(config):
    raise UserError(f'no text can be generated: {reason}')
  run = experiment.restore(config, workdir, str(step))
  trained = run.params, run.model_state
  generator = Generator(run.task.logits, trained, config.block_size)
  return pieces(generator, run.tokenizer, prompts, numbers)


def pieces(
  generator: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  numbers: Mapping[str, Any],
) -> Iterator[list[str]]:
  """Yields the next piece of each continuation, as `generate` does.

  Args:
    generator: `nanomoe.sampling.Generator` of the model.
    tokenizer: Tokenizer of the run.
    prompts: Texts to continue, as of `checked_prompts`.
    numbers: Value of each name in `NUMBERS`, as of `checked`.

  Raises:
    UserError: A prompt has an unknown character. It is raised before the first
      piece.
  """
  from nanomoe.sampling import Sampling  # noqa: PLC0415 (JAX takes seconds)

  try:
    tokens = [tokenizer.encode(prompt).tolist() for prompt in prompts]
  except UserError as error:
    raise UserError(f'--prompt: {error}') from error
  num_tokens, seed = numbers['num_tokens'], numbers['seed']
  sampling = Sampling(*(numbers[k] for k in Sampling._fields))
  drawn = generator(tokens, num_tokens, sampling, seed)
  texts = [Text(tokenizer.decode, row) for row in tokens]
  return (
    [
      text.add(int(token), last=i == num_tokens)
      for text, token in zip(texts, row, strict=True)
    ]
    for i, row in enumerate(drawn, 1)
  )


def checked(**numbers: Any) -> dict[str, Any]:
  """Returns `numbers` as Python's own; a text is read as a config key's value.

  Raises:
    UserError: A line for each number that is not allowed.
  """
  found, lines = {}, []
  for name, given in numbers.items():
    _, field = NUMBERS[name]
    value = given
    try:
      if isinstance(given, str):
        value = config_lib.number(field.kind, given)
      elif hasattr(given, 'item'):  # Of NumPy or JAX.
        value = given.item()
      reason = validation.violation(field, value)
    except (ValueError, OverflowError):
      reason = f'it must be {field.allowed}'
    if reason:
      lines.append(f'--{name}={validation.shown(given)}: {reason}')
    else:
      found[name] = field.kind(value)
  if lines:
    raise UserError(lines)
  return found


def checked_prompts(prompts: Sequence[str]) -> list[str]:
  """Returns prompts without byte order marks.

  Args:
    prompts: Texts to continue.

  Raises:
    UserError: A prompt is empty or is not UTF-8.
  """
  prompts = [_without_mark(prompt) for prompt in prompts]
  if not all(prompts):
    raise UserError(
      "--prompt='': it is empty; it must have at least one character"
    )
  for prompt in prompts:
    check_utf8('--prompt', prompt)
  return prompts


def check_utf8(name: str, text: str) -> None:
  """Raises an error for half of a surrogate pair, which no UTF-8 has.

  Args:
    name: Name of the option or argument, for the error.
    text: Its value.

  Raises:
    UserError: The text is not UTF-8.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{name}={text!r}: it is not UTF-8 from character {error.start} on'
    ) from error


def _without_mark(prompt: str) -> str:
  """A prompt from a file may begin with a byte order mark, as texts do."""
  if prompt.startswith(corpus.MARK):
    log.info('--prompt begins with a byte order mark, which is dropped')
  return prompt.removeprefix(corpus.MARK)


class Text:
  """Text of tokens that arrive one by one, in whole characters.

  Args:
    decode: Returns the text of tokens; U+FFFD stands for incomplete bytes.
    prompt: Tokens whose text is already shown.
  """

  def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]):
    self._decode = decode
    # A decoder may look at the neighbours of a token, and decoding a long text
    # again is slow: the last whole characters are enough.
    self._context, self._new = list(prompt), []

  def add(self, token: int, *, last: bool = False) -> str:
    """Returns the text that `token` completes; with `last`, all the rest."""
    self._new.append(token)
    before = self._decode(self._context)
    text = self._decode(self._context + self._new)
    if text.endswith('\N{REPLACEMENT CHARACTER}') and not last:
      return ''
    self._context, self._new = self._new, []
    return text[len(before) :]


def _parse(argv: list[str]) -> None:
  cli.parse_flags(argv, _FLAGS, _USAGE)


def main(_: None) -> int:
  """Prints the texts that the flags ask for; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  prompts = [_without_mark(prompt) for prompt in _PROMPT.value]
  pieces = generate(
    pathlib.Path(_WORKDIR.value),
    prompts,
    **checked(**{name: _FLAGS[name].value for name in NUMBERS}),
    step=_STEP.value,
    allow_imports=_ALLOW_IMPORTS.value,
  )
  # One text can be shown while it is made; of several, each in its turn.
  texts = [[prompt] for prompt in prompts]
  live = len(prompts) == 1
  if live:
    cli.show(prompts[0])
  try:
    for piece in pieces:
      if live:
        cli.show(piece[0])
      for text, new in zip(texts, piece, strict=True):
        text.append(new)
    if not live:
      cli.show('\n\n'.join(''.join(text) for text in texts))
  finally:  # Ctrl-C too ends the line.
    cli.show('\n')
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
