"""History of a run: its config, its result, and its recorded metrics."""

from collections.abc import Mapping, Sequence
import dataclasses
import fcntl
import json
import logging
import pathlib
from typing import Any, NamedTuple

from jaxtyping import Float, Int
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError

log = logging.getLogger(__name__)


class Series(NamedTuple):
  """A metric by step.

  Attributes:
    steps: Steps of the records, in increasing order.
    values: Value of the metric at each step; NaN for a value that was not
      finite.
  """

  steps: Int[np.ndarray, ' records']
  values: Float[np.ndarray, 'records ...']


@dataclasses.dataclass(frozen=True)
class History:
  """Everything that a run has recorded.

  Attributes:
    workdir: Directory of the run.
    config: Config of the run. Keys that an older version lacked have the values
      by which it behaved.
    result: Content of result.json; empty before the first start ended.
    records: Lines of metrics.jsonl: values by name, with the `step`.
    is_running: Whether a process is training in the workdir.
  """

  workdir: pathlib.Path
  config: Config
  result: Mapping[str, Any]
  records: Sequence[Mapping[str, Any]]
  is_running: bool

  def names(self) -> list[str]:
    """Returns the names of all metrics, sorted."""
    found = {name for record in self.records for name in record}
    return sorted(found - {'step'})

  def series(self, name: str) -> Series:
    """Returns the metric `name`; of several records of a step, the last.

    A rollback trains steps again: only records of the steps that were kept are
    in the file.

    Raises:
      UserError: No record has the metric, or a value is not a number.
    """
    found = {r['step']: r[name] for r in self.records if name in r}
    if not found:
      raise UserError(
        f'{self.workdir / "metrics.jsonl"}: no record of {name!r}; metrics are '
        f'{", ".join(self.names()) or "missing"}'
      )
    steps = sorted(found)
    # JSON has null for NaN and infinities.
    try:
      values = np.array([found[step] for step in steps], np.float64)
    except (TypeError, ValueError, OverflowError) as error:
      raise UserError(
        f'{self.workdir / "metrics.jsonl"}: the file is damaged ({name!r} is '
        'not a number in each record)'
      ) from error
    return Series(np.array(steps), values)

  def all_series(self) -> dict[str, Series]:
    """Returns all metrics that are numbers, by name.

    A metric of a plug-in may be a text, for example. A warning names it.
    """
    found = {}
    for name in self.names():
      try:
        found[name] = self.series(name)
      except UserError:
        log.warning('%s: it is not a number in each record; left out', name)
    return found

  def frame(self) -> Any:
    """Returns all metrics as a DataFrame of pandas, with the steps as index.

    An array has a column per element: 'val/load_entropy/0' belongs to layer 0.
    NaN stands where a metric was not recorded.

    Raises:
      UserError: pandas is not installed.
    """
    try:
      import pandas  # noqa: PLC0415 # pyright: ignore[reportMissingImports]
    except ImportError as error:
      raise UserError(
        "frame=True: pandas is not installed; run 'pip install pandas'"
      ) from error
    columns = {}
    for name, (steps, values) in self.all_series().items():
      for index in np.ndindex(values.shape[1:]):
        column = '/'.join([name, *map(str, index)])
        columns[column] = pandas.Series(values[:, *index], steps)
    return pandas.DataFrame(columns).rename_axis('step')

  def train_seconds(self, steps: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the seconds of training that the first `steps` steps took.

    The seconds are summed over the recorded speeds. They exclude compilation,
    evaluation and checkpoints. A step between two records counts in proportion.

    Args:
      steps: Numbers of steps. NaN is returned for a step after the last record.
    """
    speed = self.series('steps_per_sec')
    ends = np.concatenate([[0], speed.steps])
    seconds = np.cumsum(np.diff(ends) / speed.values)
    seconds = np.concatenate([[0.0], seconds])
    return np.asarray(np.interp(steps, ends, seconds, right=np.nan))


def read(workdir: pathlib.Path) -> History:
  """Returns the history of the run in `workdir`.

  Raises:
    UserError: There is no run, or one of its files is damaged or has mistakes.
      The line names the file, and the line in it.
  """
  config = workdir_lib.config_of(workdir)
  # A run that ends meanwhile is called running, with all of its records.
  is_running = is_locked(workdir / 'log.txt')
  return History(
    workdir,
    config,
    _result(workdir / 'result.json'),
    _records(workdir / 'metrics.jsonl', is_running),
    is_running,
  )


def curve(
  workdir: pathlib.Path, name: str, is_running: bool
) -> list[tuple[int, float]]:
  """Returns (step, value) of a scalar metric after step 0, in order of steps.

  Unlike `read`, it serves runs that have not recorded anything yet, and leaves
  the lock of the log alone: a run that starts in this moment needs it.

  Args:
    workdir: Directory of the run.
    name: Name of the metric.
    is_running: Whether the last line may be incomplete.

  Raises:
    UserError: metrics.jsonl is damaged.
  """
  records = _records(workdir / 'metrics.jsonl', is_running)
  found = {r['step']: r[name] for r in records if name in r and r['step']}
  # JSON has null for NaN and infinities.
  return [
    (step, float('nan') if found[step] is None else float(found[step]))
    for step in sorted(found)
  ]


def is_locked(path: pathlib.Path) -> bool:
  """Returns whether another process holds the lock of a file."""
  try:
    with path.open('rb') as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:  # No log, or a file system without locks.
    return False
  return False


def _result(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError:
    return {}
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: the file is damaged ({error})') from error
  if not isinstance(value, dict):
    raise UserError(f'{path}: the file is damaged (it must be an object)')
  return value


def _records(path: pathlib.Path, is_running: bool) -> list[dict[str, Any]]:
  """Returns the records of metrics.jsonl, or [] if there is no such file.

  Args:
    path: Path of the file.
    is_running: Whether the last line may be incomplete.
  """
  try:
    lines = path.read_bytes().split(b'\n')
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}') from error
  rest = lines.pop()
  if rest and not is_running:
    # kill -9 can leave a part of a line, which resuming removes.
    try:
      json.loads(rest)
    except ValueError:
      pass
    else:
      lines.append(rest)  # An editor removed the last newline.
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      step = record.get('step') if isinstance(record, dict) else None
      if type(step) is not int or not 0 <= step < 1 << 63:
        raise ValueError("it must be an object with a 'step'")
    except (ValueError, RecursionError) as error:
      raise UserError(
        f'{path}, line {number}: the line is damaged ({error})'
      ) from error
    records.append(record)
  return records
