"""python -m nanomoe.generate --workdir=DIR --prompt='ROMEO:'

Prints the prompt and what the model makes of it, alone on standard output, as
it is made.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import pathlib
import sys

from absl import flags

from nanomoe.run import cli, terminal, trusted_imports
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the run; needed.', required=True, flag_values=_FLAGS
)
_PROMPT = flags.DEFINE_multi_string(
  'prompt',
  ['\n'],
  'A text to continue, exactly as the shell hands it over: a new line is '
  "--prompt=$'one\\ntwo' in bash and zsh. May be given several times.",
  flag_values=_FLAGS,
)
_NUM_TOKENS = flags.DEFINE_integer(
  'num_tokens', 500, 'How many to generate.', lower_bound=0, flag_values=_FLAGS
)
_TEMPERATURE = flags.DEFINE_float(
  'temperature',
  0.8,
  'Divides the logits; 0: the likeliest.',
  lower_bound=0,
  flag_values=_FLAGS,
)
_TOP_K = flags.DEFINE_integer(
  'top_k',
  0,
  'Draws from the k likeliest; 0: from all.',
  lower_bound=0,
  flag_values=_FLAGS,
)
_TOP_P = flags.DEFINE_float(
  'top_p',
  1.0,
  'Draws from the likeliest that make up this probability; 1: from all.',
  lower_bound=0,
  upper_bound=1,
  flag_values=_FLAGS,
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Of the draws.', lower_bound=0, flag_values=_FLAGS
)
_STEP = flags.DEFINE_string(
  'step',
  'best',
  'Of the checkpoint: a number, best, or latest.',
  flag_values=_FLAGS,
)
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)


def generate(
  workdir: pathlib.Path,
  prompts: Sequence[str],
  *,
  num_tokens: int = 500,
  temperature: float = 0.8,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int = 0,
  step: str = 'best',
  allow_imports: Collection[str] = (),
) -> Iterator[list[str]]:
  """Yields, `num_tokens` times, the next piece of each prompt's continuation.

  A piece is '' while a character is incomplete: a token may be a part of one.

  Raises:
    UserError: there is no such run or checkpoint, it names code that is not
      in `allow_imports` (see nanomoe.run.trusted_imports), a prompt is empty,
      a character of it is unknown, or the model is not causal. All of it
      before the first piece.
  """
  config = workdir_lib.config_of(workdir)
  trusted_imports.check(
    trusted_imports.paths(config.to_dict(), trusted_imports.OF_A_MODEL),
    allow_imports,
  )
  if not all(prompts):
    raise UserError('--prompt is empty: it must have a character at least')
  for prompt in prompts:
    try:
      prompt.encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f'--prompt={prompt!r}: it is not UTF-8 from character {error.start} on'
      ) from error

  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.model import build  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.sampling import Generator, Sampling  # noqa: PLC0415

  if reason := build.generation_problem(config):
    raise UserError(f'no text can be generated: {reason}')
  run = experiment.restore(config, workdir, step)
  trained = run.params, run.model_state
  generator = Generator(run.task.logits, trained, config.block_size)
  try:
    tokens = [run.tokenizer.encode(prompt).tolist() for prompt in prompts]
  except UserError as error:
    raise UserError(f'--prompt: {error}') from error
  drawn = generator(
    tokens, num_tokens, Sampling(temperature, top_k, top_p), seed
  )
  texts = [Text(run.tokenizer.decode, row) for row in tokens]
  return (
    [
      text.add(int(token), last=i == num_tokens)
      for text, token in zip(texts, row, strict=True)
    ]
    for i, row in enumerate(drawn, 1)
  )


class Text:
  """Tokens -> text as they come, in whole characters.

  Args:
    decode: of a tokenizer: the text of some tokens, U+FFFD for what is none.
    prompt: tokens whose text is there already.
  """

  def __init__(self, decode: Callable[[list[int]], str], prompt: list[int]):
    self._decode = decode
    # The last tokens that made whole characters, and those since then: a
    # decoder may see a token's neighbours, and all of a long text costs more.
    self._told, self._new = list(prompt), []

  def add(self, token: int, *, last: bool = False) -> str:
    """What `token` completes; all that is left if it is the `last`."""
    self._new.append(token)
    before = self._decode(self._told)
    text = self._decode(self._told + self._new)
    if text.endswith('\N{REPLACEMENT CHARACTER}') and not last:
      return ''
    self._told, self._new = self._new, []
    return text[len(before) :]


def _parse(argv: list[str]) -> None:
  cli.parse_flags(argv, _FLAGS, str(__doc__))


def main(_: None) -> int:
  terminal.log_to_terminal(sys.stderr)
  prompts = _PROMPT.value
  pieces = generate(
    pathlib.Path(_WORKDIR.value),
    prompts,
    num_tokens=_NUM_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
    step=_STEP.value,
    allow_imports=_ALLOW_IMPORTS.value,
  )
  # One text can be shown while it is made; of several, each in its turn.
  texts = [[prompt] for prompt in prompts]
  live = len(prompts) == 1
  if live:
    _show(prompts[0])
  try:
    for piece in pieces:
      if live:
        _show(piece[0])
      for text, new in zip(texts, piece, strict=True):
        text.append(new)
    if not live:
      _show('\n\n'.join(''.join(text) for text in texts))
  finally:  # Ctrl-C too ends the line.
    _show('\n')
  return 0


def _show(text: str) -> None:
  sys.stdout.write(text)
  sys.stdout.flush()


if __name__ == '__main__':
  cli.run(main, _parse)
