"""Command that writes a page about the routing of a run."""

from collections.abc import Collection, Sequence
import json
import logging
import os
import pathlib
import sys
from typing import Any

from absl import flags

from nanomoe.config import home, overrides, validation
from nanomoe.config.schema import Field
from nanomoe.data import corpus
from nanomoe.data.large_text import LargeText
from nanomoe.run import backend, cli, history, terminal, trusted_imports
from trainers.errors import UserError
from trainers.files import jsonable, to_json, write_atomically

log = logging.getLogger(__name__)

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.routing --workdir=DIR

Writes an HTML page about the experts that tokens choose, which needs no
network, and the same figures as JSON: DIR/routing.html and DIR/routing.json.
The text is the validation split of the run, or other texts (--text=FILE). The
page compares several texts.
"""
_NUM_TOKENS = Field(int, 'Largest number of tokens of each text', 1, 1 << 20)
MAX_TEXTS = 20
_FLAGS = flags.FlagValues()
_WORKDIR = cli.define_workdir(_FLAGS)
_TEXT = flags.DEFINE_multi_string(
  'text',
  [],
  'Path of a UTF-8 text to route, or LABEL=PATH. It may be given several '
  'times; texts with one label count as one. Default: the validation split of '
  'the run.',
  flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'Path of the page, which ends in .html. Default: routing.html in the '
  'workdir.',
  flag_values=_FLAGS,
)
_NUM_TOKENS_FLAG = flags.DEFINE_string(
  'num_tokens',
  '16384',
  f'{_NUM_TOKENS.meaning}; {_NUM_TOKENS.allowed}.',
  flag_values=_FLAGS,
)
_STEP = cli.define_step(_FLAGS, 'latest')
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)


def routing(
  workdir: str | pathlib.Path,
  texts: Sequence[str | pathlib.Path] = (),
  out: str | pathlib.Path | None = None,
  *,
  num_tokens: int = 16384,
  step: str | int = 'latest',
  allow_imports: Collection[str] = (),
) -> dict[str, Any]:
  """Writes the page and the JSON of a run's routing, and returns the JSON.

  Args:
    workdir: Directory of the run, which may be in progress.
    texts: Paths of UTF-8 texts, or 'LABEL=PATH'; none for the validation split
      of the run. The label of a text without one is its path.
    out: Path of the page, which ends in '.html'; None for routing.html in the
      workdir. The JSON has the same name with the suffix '.json'.
    num_tokens: Largest number of tokens of each text; its beginning is taken.
    step: Step of the checkpoint: a number, 'best' or 'latest'.
    allow_imports: Import paths that the config of the run may name.

  Returns:
    `about`, the facts about run and texts, and `figures` by name, as in
    `nanomoe.inspection.figures.make`.

  Raises:
    UserError: There is no such run, checkpoint or text, a text has characters
      that the tokenizer does not know, no layer has experts, or the page cannot
      be written.
  """
  if reason := validation.violation(_NUM_TOKENS, num_tokens):
    raise UserError(f'--num_tokens={num_tokens}: {reason}')
  workdir = pathlib.Path(home.expand(str(workdir), '--workdir'))
  recorded = history.read(workdir)
  config = recorded.config
  out = _checked_out(workdir, out)
  trusted_imports.check(
    trusted_imports.paths(config.to_dict(), trusted_imports.OF_A_MODEL),
    allow_imports,
  )
  given: dict[str, list[str | LargeText]] = {}
  for label, path in map(_labeled, map(str, texts)):
    text = corpus.read(home.expand(path, '--text'), '--text').text
    given.setdefault(label, []).append(text)
    if len(given) > MAX_TEXTS:
      raise UserError(f'--text: over {MAX_TEXTS} labels; at most that many fit')

  backend.start()
  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.inspection import figures, page, reading  # noqa: PLC0415
  from nanomoe.model.build import layers_with_experts  # noqa: PLC0415

  if not layers_with_experts(config):
    raise UserError(
      f'--workdir={workdir}: no layer of the model has experts; the page needs '
      'a model with experts'
    )
  run = experiment.restore(config, workdir, str(step))
  if not given:
    given = {'val': [reading.validation_split(config, workdir)]}
  tokens = {
    label: [
      reading.tokens_of(label, text, run.tokenizer, num_tokens)
      for text in of_label
    ]
    for label, of_label in given.items()
  }
  every = [text for of_label in tokens.values() for text in of_label]
  tracer = reading.Tracer(run.task, config, every)
  trace = tracer(run.params, run.model_state)
  earlier = {}
  for other in reading.steps_before(workdir, run.step):
    try:
      saved = experiment.restore(config, workdir, str(other))
    except UserError as error:  # Damaged, or deleted by its trainer.
      log.warning('%s; it is left out', error.problems[0])
    else:
      earlier[other] = tracer(saved.params, saved.model_state)
  sample = reading.sample(tokens, run.tokenizer)
  result = {
    'about': reading.about(recorded, run.step, tokens, trace),
    'figures': figures.make(
      sample,
      trace,
      earlier,
      run.step,
      reading.loads(recorded),
      config.batch_size * config.block_size,
    ),
  }
  values = jsonable(result)
  _write(out.with_suffix('.json'), to_json(values))
  _write(out, page.html(values))
  return values


def _labeled(word: str) -> tuple[str, str]:
  """Returns the label and the path of a value of --text."""
  label, equals, path = word.partition('=')
  if not equals or not label or os.path.exists(word):
    return word, word
  return label, path


def _checked_out(
  workdir: pathlib.Path, out: str | pathlib.Path | None
) -> pathlib.Path:
  """Returns the path of the page.

  Raises:
    UserError: The path does not end in .html, its directory does not exist, or
      the JSON would replace another file.
  """
  path = pathlib.Path(
    workdir / 'routing.html' if out is None else home.expand(str(out), '--out')
  )
  if path.suffix != '.html':
    raise UserError(f'--out={path}: the path must end in .html')
  if not path.parent.is_dir():
    raise UserError(f'--out={path}: the directory {path.parent} does not exist')
  target = path.with_suffix('.json')
  if target.exists() and not _has_figures(target):
    raise UserError(f'--out={path}: {target} is another file; choose a name')
  return path


def _has_figures(path: pathlib.Path) -> bool:
  """Returns whether a file is the JSON of an earlier page."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    return set(found) == {'about', 'figures'}
  except (OSError, ValueError, TypeError):
    return False


def _write(path: pathlib.Path, text: str) -> None:
  try:
    write_atomically(path, text)
  except OSError as error:
    raise UserError(
      f'{path}: the file cannot be written ({error.strerror}); --out=FILE.html '
      'selects another'
    ) from error


def _parse(argv: list[str]) -> None:
  cli.parse_flags(argv, _FLAGS, _USAGE)


def main(_: None) -> int:
  """Writes the page that the flags ask for; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  try:
    num_tokens = overrides.number(int, _NUM_TOKENS_FLAG.value)
  except ValueError as error:
    raise UserError(
      f'--num_tokens={_NUM_TOKENS_FLAG.value}: it must be {_NUM_TOKENS.allowed}'
    ) from error
  result = routing(
    _WORKDIR.value,
    _TEXT.value,
    _OUT.value,
    num_tokens=int(num_tokens),
    step=_STEP.value,
    allow_imports=_ALLOW_IMPORTS.value,
  )
  about = result['about']
  out = _checked_out(pathlib.Path(about['workdir']), _OUT.value)
  cli.show(
    f'{out}: step {about["step"]}, {about["num_tokens"]:,} tokens of '
    f'{", ".join(text["name"] for text in about["texts"])}\n'
    f'{out.with_suffix(".json")}: the same figures\n'
  )
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
