"""Jobs of several configs and seeds that all train for equal minutes."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

from nanomoe.config.overrides import Override
from nanomoe.run import workdir as workdir_lib
from nanomoe.sweeps import estimate
from nanomoe.sweeps import jobs as jobs_lib
from nanomoe.sweeps.jobs import Job
from trainers.errors import UserError

FILE = 'minutes.json'
# Each config is timed in so many turns; the quickest counts, since other
# processes of the machine only slow a step down.
_ROUNDS = 2
_EVALUATIONS = 10  # Of a run, unless its config has more.


def make(
  configs: Sequence[str],
  num_seeds: int,
  minutes: float,
  overrides: Sequence[Override],
  out: pathlib.Path,
) -> list[Job]:
  """Returns a job for each seed and config, the configs in turn.

  The number of steps follows from the time of a step, so that a schedule ends
  with the run. The times are measured once, and recorded in `out`: the same
  call has the same jobs again.

  Args:
    configs: Paths of config files.
    num_seeds: Number of seeds, from 0.
    minutes: Minutes of training, without compilation, evaluation and
      checkpoints.
    overrides: Keys and values of all jobs.
    out: Directory of all runs.

  Raises:
    UserError: A line for each mistake, a config cannot be trained, or `out`
      has runs of other configs or minutes.
  """
  names = {config: pathlib.Path(config).stem for config in configs}
  if len(set(names.values())) < len(configs):
    raise UserError(
      f'--train: {", ".join(configs)}: the names of the files must differ'
    )
  asked = {key for key, _ in overrides} & {'num_train_steps', 'seed'}
  if asked:
    raise UserError(
      [
        f'--config.{key}: --minutes and --seeds set it; leave it out'
        for key in sorted(asked)
      ]
    )
  plain = [
    dataclasses.replace(
      jobs_lib.make(config, overrides, [{}])[0], name=f'{name},timing'
    )
    for config, name in names.items()
  ]
  facts = {
    'minutes': minutes,
    'configs': [dict(sorted(job.values.items())) for job in plain],
  }
  steps = _recorded(out, facts)
  if steps is None:
    steps = [max(round(60 * minutes / x), 1) for x in _step_seconds(plain)]
    out.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_json(out / FILE, {**facts, 'num_train_steps': steps})
  jobs = []
  for seed in range(num_seeds):
    for job, num_steps in zip(plain, steps, strict=True):
      interval = min(
        job.values['eval_interval'], max(num_steps // _EVALUATIONS, 1)
      )
      changes = {
        'seed': str(seed),
        'num_train_steps': str(num_steps),
        'eval_interval': str(interval),
      }
      jobs.append(
        Job(
          f'{names[job.config]},seed={seed}',
          job.config,
          [*overrides, *changes.items()],
          changes,
        )
      )
  jobs_lib.check_directories(jobs, out)
  return jobs


def _recorded(out: pathlib.Path, facts: dict[str, Any]) -> list[int] | None:
  """Returns the steps of each config that an earlier call recorded, if any."""
  path = out / FILE
  try:
    recorded = json.loads(path.read_text(encoding='utf-8'))
    steps = [int(x) for x in recorded.pop('num_train_steps')]
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{path}: the file is damaged ({error})') from error
  if recorded != json.loads(json.dumps(facts)):
    raise UserError(
      f'--out={out}: it has runs of other configs or minutes; choose another '
      'directory'
    )
  return steps


def _step_seconds(jobs: Sequence[Job]) -> list[float]:
  """Returns the seconds of a step of each job, timed in turn."""
  rounds = [
    [
      estimate.timed(job, estimate.TIMED_STEPS).token
      * job.values['batch_size']
      * job.values['block_size']
      for job in jobs
    ]
    for _ in range(_ROUNDS)
  ]
  return [min(seconds) for seconds in zip(*rounds, strict=True)]
