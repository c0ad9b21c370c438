"""Command that evaluates a checkpoint on a text."""

from collections.abc import Collection
import itertools
import pathlib
import sys
import time
from typing import Any

from absl import flags

from nanomoe.config import home
from nanomoe.data import corpus
from nanomoe.run import backend, cli, terminal, trusted_imports
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError
from trainers.files import to_json

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.evaluate --workdir=DIR --split=val --step=best

Prints the exact cross-entropy of a checkpoint as JSON: one pass over a split of
the text of the run, or over another text (--data=FILE), each target once.
The speed excludes compilation.
"""
_FLAGS = flags.FlagValues()
_WORKDIR = cli.define_workdir(_FLAGS)
_SPLIT = flags.DEFINE_enum(
  'split',
  None,
  ['train', 'val'],
  'Split of the text of the run. Default: val.',
  flag_values=_FLAGS,
)
_DATA = flags.DEFINE_string(
  'data',
  None,
  'Path of another UTF-8 text, which is evaluated as a whole.',
  flag_values=_FLAGS,
)
_STEP = cli.define_step(_FLAGS)
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)


def evaluate(
  workdir: str | pathlib.Path,
  split: str,
  step: str | int,
  data: str | None = None,
  allow_imports: Collection[str] = (),
) -> dict[str, Any]:
  """Returns the metrics of one pass, and what was evaluated, as JSON values.

  Args:
    workdir: Directory of the run.
    split: Split of the text of the run, if `data` is None.
    step: Step of the checkpoint: a number, 'best' or 'latest'.
    data: Path of another text, which is evaluated as a whole.
    allow_imports: Import paths that the config of the run may name.

  Raises:
    UserError: There is no such run, checkpoint or text, or the text has
      characters that the tokenizer of the run does not know.
  """
  workdir = pathlib.Path(home.expand(str(workdir), '--workdir'))
  config = workdir_lib.config_of(workdir)
  trusted_imports.check(
    trusted_imports.paths(config.to_dict(), trusted_imports.OF_A_MODEL),
    allow_imports,
  )

  if data is not None:
    other = corpus.read(home.expand(data, '--data'), '--data')

  backend.start()
  import jax  # noqa: PLC0415 (it takes seconds)

  from nanomoe import experiment  # noqa: PLC0415
  from nanomoe.data import pipeline as text_lib  # noqa: PLC0415
  from nanomoe.moe.dispatch import registry  # noqa: PLC0415
  from trainers.checkpoint import compatibility  # noqa: PLC0415
  from trainers.evaluator import Evaluator  # noqa: PLC0415
  from trainers.metrics import is_for_files  # noqa: PLC0415

  config.eval_iters = 0  # Each target of the split, once.
  run = experiment.restore(config, workdir, str(step))
  if data is None:
    _, _, dataset = text_lib.read(config, workdir)
    compatibility.check(run.identity, {'data': dataset.fingerprint})
    of = {'split': split}
  else:
    try:
      dataset = text_lib.whole(
        other.text, run.tokenizer, config, other.fingerprint
      )
    except UserError as error:
      raise UserError(f'--data={data}: {error}') from error
    split, of = text_lib.WHOLE, {'data': data}
  num_tokens = 0

  def batches():
    nonlocal num_tokens
    for batch in dataset.eval_batches(split, slice(0, config.batch_size)):
      num_tokens += int(batch['weights'].sum())
      yield batch

  evaluator = Evaluator(run.task)
  params, model_state = jax.device_put((run.params, run.model_state))
  evaluator(params, model_state, itertools.islice(batches(), 1))  # Compiles.
  num_tokens, start = 0, time.perf_counter()
  metrics = evaluator(params, model_state, batches())
  return {
    'workdir': str(workdir),
    'step': run.step,
    'weights': config.eval_weights,
    'dispatch': registry.eval_dispatch(config.moe),
    **of,
    **{k: v for k, v in metrics.items() if is_for_files(v)},
    'num_tokens': num_tokens,
    'tokens_per_sec': num_tokens / (time.perf_counter() - start),
  }


def _parse(argv: list[str]) -> None:
  cli.parse_flags(argv, _FLAGS, _USAGE)


def main(_: None) -> int:
  """Prints the evaluation that the flags ask for; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  if _DATA.value is not None and _SPLIT.value:
    raise UserError(
      '--split: it selects a split of the text of the run; leave it out with '
      '--data'
    )
  result = evaluate(
    pathlib.Path(_WORKDIR.value),
    _SPLIT.value or 'val',
    _STEP.value,
    _DATA.value,
    _ALLOW_IMPORTS.value,
  )
  print(to_json(result, indent=2))
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
