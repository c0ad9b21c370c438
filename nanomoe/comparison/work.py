"""Parameters and FLOPs of the runs of a comparison."""

from collections.abc import Callable, Collection, Sequence
from concurrent import futures
import json
import os
from typing import Any

from nanomoe.comparison.runs import Apart, Run
from nanomoe.config import schema
from nanomoe.data import tokenizers
from nanomoe.data.pipeline import VOCABULARY
from nanomoe.planning import estimate
from nanomoe.run import trusted_imports
from trainers.errors import UserError

# Keys without an influence on the traced products of a step.
_WITHOUT_WORK = (
  *('seed', 'num_train_steps', 'eval_interval', 'eval_iters', 'log_interval'),
  *('eval_weights', 'init_from'),
)
_SECTIONS_WITHOUT_WORK = (
  'data',
  'checkpoint',
  'sample',
  'callbacks',
  'writers',
)
# Types that are imported to count the work.
_IMPORTED = (
  *('model.attention.type', 'moe.router.type', 'data.tokenizer.type'),
  *('optimizer.type', 'optimizer.schedule.type'),
)


def count(
  runs: Sequence[Run], allow_imports: Collection[str] = ()
) -> tuple[list[Run], list[Apart]]:
  """Counts the work of each run; returns causal runs, and the others.

  Child processes trace each shape once, as many at a time as there are cores.

  Args:
    runs: Runs, whose `work` is set.
    allow_imports: Import paths that the configs of the runs may name.
  """
  tasks: dict[int, futures.Future] = {}
  shapes: dict[str, futures.Future] = {}
  causal, apart = [], []
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for index, run in enumerate(runs):
      try:
        ask = _question(run, allow_imports)
      except UserError as error:
        apart.append(Apart(run.workdir, '; '.join(error.problems)))
        continue
      shape = _shape(run)
      if shape not in shapes:
        shapes[shape] = pool.submit(ask)
      tasks[index] = shapes[shape]
  for index, run in enumerate(runs):
    if index not in tasks:
      continue
    try:
      run.work = dict(tasks[index].result())
    except UserError as error:
      apart.append(Apart(run.workdir, '; '.join(error.problems)))
      continue
    except RuntimeError as error:
      reason = str(error).strip().splitlines()[-1]
      apart.append(Apart(run.workdir, f'its model cannot be built: {reason}'))
      continue
    if problem := run.work.pop('generation_problem'):
      apart.append(Apart(run.workdir, problem))
    else:
      causal.append(run)
  return causal, apart


def _question(
  run: Run, allow_imports: Collection[str]
) -> Callable[[], dict[str, Any]]:
  """Returns a function that counts the work of a run in a child process."""
  config, result = run.history.config, run.history.result
  named = trusted_imports.paths(config.to_dict(), _IMPORTED)
  trusted_imports.check(named, allow_imports)
  vocab_size = result.get('vocab_size')
  if vocab_size is None:  # Older versions did not record it.
    vocab_size = tokenizers.load(
      config.data.tokenizer.to_dict(), run.workdir / VOCABULARY
    ).vocab_size
  num_devices = _num_devices(run)
  return lambda: estimate.work(config, vocab_size, num_devices)


def _num_devices(run: Run) -> int:
  """Returns the number of devices that a mesh axis of -1 used; 0 without."""
  has_rest = -1 in run.history.config.mesh.to_dict().values()
  return len(run.machine().devices) if has_rest else 0


def _shape(run: Run) -> str:
  """Returns a text that is equal for runs with equal work."""
  values = run.history.config.to_dict()
  flat = {
    key: value
    for key, value in schema.flatten(values)
    if key not in _WITHOUT_WORK
    and key.split('.')[0] not in _SECTIONS_WITHOUT_WORK
    and not (key.startswith('optimizer.') and key in schema.FIELDS)
    and not key.startswith('optimizer.schedule.')
  }
  vocab_size = run.history.result.get('vocab_size', run.tokenizer())
  return json.dumps([flat, vocab_size, _num_devices(run)], sort_keys=True)
