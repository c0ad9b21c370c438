"""python -m nanomoe.evaluate --workdir=DIR --split=val --step=best

Prints, as JSON, the exact cross-entropy of a run's checkpoint: one pass over
the split, each target once.
"""

import pathlib
import sys
import time
from typing import Any

from absl import flags

from nanomoe import command, terminal
from nanomoe import workdir as workdir_lib
from trainers.files import to_json

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of the run.', required=True, flag_values=_FLAGS
)
_SPLIT = flags.DEFINE_enum(
  'split', 'val', ['train', 'val'], 'What to read.', flag_values=_FLAGS
)
_STEP = flags.DEFINE_string(
  'step', 'best', 'A step, best, or latest.', flag_values=_FLAGS
)


def evaluate(workdir: pathlib.Path, split: str, step: str) -> dict[str, Any]:
  """JSON values: the task's metrics over one pass, and what was evaluated.

  Raises:
    UserError: there is no such run, or no such checkpoint.
  """
  config = workdir_lib.config_of(workdir)

  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.data import text as text_lib  # noqa: PLC0415
  from trainers.checkpoint import check_fingerprint  # noqa: PLC0415
  from trainers.evaluator import Evaluator  # noqa: PLC0415

  config.eval_iters = 0  # Each target of the split, once.
  run = experiment.restore(config, workdir, step)
  _, _, dataset = text_lib.read(config, workdir)
  check_fingerprint(run.fingerprint, dataset.fingerprint)
  batches = list(dataset.eval_batches(split, slice(0, config.batch_size)))
  num_tokens = int(sum(batch['weights'].sum() for batch in batches))
  start = time.perf_counter()
  metrics = Evaluator(run.task)(run.params, run.model_state, batches)
  return {
    'workdir': str(workdir),
    'step': run.step,
    'split': split,
    **metrics,
    'num_tokens': num_tokens,
    'tokens_per_sec': num_tokens / (time.perf_counter() - start),
  }


def _parse(argv: list[str]) -> None:
  command.parse_flags(argv, _FLAGS, str(__doc__))


def main(_: None) -> int:
  terminal.log_to_terminal(sys.stderr)
  result = evaluate(pathlib.Path(_WORKDIR.value), _SPLIT.value, _STEP.value)
  print(to_json(result, indent=2))
  return 0


if __name__ == '__main__':
  command.run(main, _parse)
