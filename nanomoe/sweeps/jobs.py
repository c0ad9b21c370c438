"""Jobs of a sweep: their configs, their names, and whether they are done."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
from typing import Any

from nanomoe.config import overrides as config_lib
from nanomoe.config import resume, schema
from nanomoe.config.overrides import Override
from nanomoe.config.schema import Config
from nanomoe.data.corpus import path_problems
from nanomoe.run import workdir as workdir_lib
from nanomoe.sweeps import grid
from trainers.errors import UserError

# Longest name of a run directory.
MAX_NAME = 100
_MAX_LINES = 20  # Of mistakes.
# Statuses in result.json with which a run has ended for good: a run that has
# diverged would diverge again.
ENDED = ('done', 'diverged', 'collapsed')


@dataclasses.dataclass(frozen=True)
class Job:
  """A run of a sweep.

  Attributes:
    name: Name of the run, and of its directory.
    config: Path of the config file.
    overrides: Keys and values that differ from the file, as texts.
    changes: Keys and values in which the job differs from other jobs.
  """

  name: str
  config: str
  overrides: Sequence[Override] = ()
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def load(self) -> Config:
    """Returns the checked config.

    Raises:
      UserError: A line for each mistake.
    """
    return config_lib.apply(
      config_lib.load_file(self.config), list(self.overrides)
    )

  @functools.cached_property
  def values(self) -> dict[str, Any]:
    """Values of all config keys."""
    return dict(schema.flatten(self.load().to_dict()))

  def words(self, workdir: pathlib.Path) -> list[str]:
    """Returns the command that starts or resumes the run in `workdir`."""
    return [
      *(sys.executable, '-m', 'nanomoe.main', '-q'),
      *(f'--config={self.config}', f'--workdir={workdir}'),
      *(f'--config.{key}={value}' for key, value in self.overrides),
    ]

  def status(self, workdir: pathlib.Path) -> str:
    """Returns the status with which the run has ended for good, or ''.

    A run whose config differs from the job's, for example in the number of
    steps, has not ended.
    """
    try:
      path = workdir / 'result.json'
      result = json.loads(path.read_text(encoding='utf-8'))
      status = str(result['status'])
      config = workdir_lib.read_config(workdir)
    except (OSError, ValueError, KeyError, TypeError, UserError):
      return ''
    if status not in ENDED or config is None or not _is_same(config, self):
      return ''
    # A killed start can have left the result of fewer steps.
    is_whole = result.get('step') == config.num_train_steps
    is_whole = is_whole or bool(result.get('stop_reason'))
    return status if is_whole else ''


def make(
  config: str,
  overrides: Sequence[Override],
  assignments: Iterable[grid.Assignment],
) -> list[Job]:
  """Returns a checked job for each assignment.

  Args:
    config: Path of the config file.
    overrides: Keys and values of all jobs.
    assignments: Keys and values of each job.

  Raises:
    UserError: A line for each mistake in a config; or two jobs are equal.
  """
  jobs, lines, paths = [], [], set()
  file = config_lib.load_file(config)
  for assignment in assignments:
    given = [*overrides, *assignment.items()]
    try:
      values = dict(schema.flatten(config_lib.apply(file, given).to_dict()))
    except UserError as error:
      lines += error.problems
      continue
    paths.add(values['data.path'])
    changes = {key: values.get(key) for key in assignment}
    job = Job(name(changes), config, tuple(given), changes)
    vars(job)['values'] = values  # The file can change while the sweep runs.
    jobs.append(job)
  lines += [x for path in sorted(paths - {''}) for x in path_problems(path)]
  counts = Counter(job.name for job in jobs)
  lines += [
    f'--over: {count} jobs are {job}; all jobs must differ'
    for job, count in counts.items()
    if count > 1
  ]
  if lines := list(dict.fromkeys(lines)):
    more = len(lines) - _MAX_LINES
    rest = [f'and {more} more mistakes'] if more > 0 else []
    raise UserError(lines[:_MAX_LINES] + rest)
  return jobs


def check_directories(jobs: Iterable[Job], out: pathlib.Path) -> None:
  """Raises an error if a run in `out` cannot be resumed as the job.

  Raises:
    UserError: A line for each difference from the first such run.
  """
  for job in jobs:
    old = workdir_lib.read_config(out / job.name)
    if old is None:
      continue
    # More steps continue a run. Another learning rate, for example, would mix
    # two configs in one curve.
    asked = {key for key, _ in job.overrides} & {'num_train_steps'}
    try:
      resume.resume_config(old, job.load(), asked)
    except UserError as error:
      hint = re.compile(r'choose another --workdir|to change it, give .*')
      raise UserError(
        [
          f'--out={out}: {job.name}: ' + hint.sub('choose another --out', line)
          for line in error.problems
        ]
      ) from error


def name(changes: Mapping[str, Any]) -> str:
  """Returns the name of the run with these changes, a name for a directory.

  The name does not depend on other jobs or on the order of the keys: a sweep
  with more values finds the runs of the sweep before.

  Args:
    changes: Values by dotted key.
  """
  text = ','.join(
    f'{_short_keys().get(key, key)}={_safe(changes[key])}'
    for key in sorted(changes)
  )
  if len(text) <= MAX_NAME:
    return text or 'run'
  return f'{text[: MAX_NAME - 9]}~{_digest(text)}'


def _safe(value: Any) -> str:
  """Returns the text of a value; a digest replaces characters of paths."""
  text = value if isinstance(value, str) else json.dumps(value)
  if re.fullmatch(r'[A-Za-z0-9._+-]+', text):
    return text
  readable = re.sub(r'[^A-Za-z0-9._+-]+', '_', os.path.basename(text))
  return f'{readable[:30]}~{_digest(text)}'


def _digest(text: str) -> str:
  data = text.encode(errors='surrogateescape')
  return hashlib.sha256(data).hexdigest()[:8]


@functools.cache
def _short_keys() -> dict[str, str]:
  """Returns the shortest end of each config key that no other key has."""
  keys = {
    *schema.FIELDS,
    *schema.ARGUMENTS,
    *(f'{s}.type' for s in schema.SPECS),
  }
  ends = Counter(end for key in keys for end in _ends(key))
  return {key: next(e for e in _ends(key) if ends[e] == 1) for key in keys}


def _ends(key: str) -> list[str]:
  """Returns 'c', 'b.c' and 'a.b.c' of 'a.b.c'."""
  parts = key.split('.')
  return ['.'.join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]


def _is_same(old: Config, job: Job) -> bool:
  """Returns whether a run has the job's config."""
  before = dict(schema.flatten(old.to_dict()))
  after = dict(job.values)
  for key, field in schema.FIELDS.items():
    if 'auto' in field.choices and after[key] == 'auto':
      after[key] = before.get(key)  # The run has recorded its choice.
  return before == after
