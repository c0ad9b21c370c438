"""Runs of a comparison, and the runs that cannot be compared."""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import glob
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

from jaxtyping import Float
import numpy as np

from nanomoe.comparison.curves import Curve
from nanomoe.config import home
from nanomoe.data import tokenizers
from nanomoe.data.pipeline import VOCABULARY
from nanomoe.run import history as history_lib
from nanomoe.run.history import History
from trainers.errors import UserError

# Metric of each unit. Tokens of two tokenizers hold different amounts of text.
METRICS = {
  'nats per token': 'val/cross_entropy',
  'bits per byte': 'val/bits_per_byte',
}


class Apart(NamedTuple):
  """Run that cannot be compared.

  Attributes:
    workdir: Directory of the run.
    reason: Reason in one line.
  """

  workdir: pathlib.Path
  reason: str


class Machine(NamedTuple):
  """Machine of a run.

  Attributes:
    devices: Kind and number of each device.
    cpu: Model and number of cores; empty if it is unknown.
  """

  devices: tuple[str, ...]
  cpu: str


@dataclasses.dataclass
class Run:
  """Run with at least one evaluation.

  Attributes:
    history: Records of the run.
    work: Parameters and FLOPs per token, as of `estimate.work`; empty if they
      are unknown.
    remarks: Sentences that a reader of the comparison should know.
  """

  history: History
  work: dict[str, Any] = dataclasses.field(default_factory=dict)
  remarks: list[str] = dataclasses.field(default_factory=list)

  @property
  def workdir(self) -> pathlib.Path:
    """Directory of the run."""
    return self.history.workdir

  @property
  def tokens_per_step(self) -> int:
    """Number of tokens in a batch."""
    return self.history.config.batch_size * self.history.config.block_size

  def curve(self, axis: str, metric: str) -> Curve | None:
    """Returns the finite evaluations along an axis of `AXES`.

    None is returned if no evaluation has a known position.
    """
    steps, losses = self.history.series(metric)
    positions = self._positions(axis, steps)
    # A line through a NaN would hide a divergence.
    end = _first(~np.isfinite(losses), len(losses))
    known = np.isfinite(positions[:end])
    curve = Curve(positions[:end][known], losses[:end][known])
    return curve if len(curve.positions) else None

  def _positions(
    self, axis: str, steps: np.ndarray
  ) -> Float[np.ndarray, ' evaluations']:
    if axis == 'seconds':
      if 'steps_per_sec' not in self.history.names():
        return np.full(len(steps), np.nan)
      return self.history.train_seconds(steps)
    per_step = 1.0 if axis == 'steps' else float(self.tokens_per_step)
    if axis == 'flops':
      per_step *= self.work.get('active_flops_per_token', np.nan)
    return steps * per_step

  @functools.cached_property
  def vocabulary(self) -> dict[str, Any]:
    """Content of vocabulary.json; empty if it is missing or damaged."""
    try:
      return tokenizers.read(self.workdir / VOCABULARY)
    except UserError:
      return {}

  def tokenizer(self) -> str:
    """Returns a text that is equal for equal tokenizers."""
    values = dict(self.vocabulary)
    if not values:
      return self.tokenizer_config()
    # Files of older versions have no type; the config has it.
    values['type'] = self.history.config.data.tokenizer.type
    text = json.dumps(
      {k: v for k, v in values.items() if not k.startswith('corpus')},
      sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()

  def tokenizer_config(self) -> str:
    """Returns the config of the tokenizer as a text."""
    return json.dumps(self.history.config.data.tokenizer.to_dict())

  def machine(self) -> Machine:
    """Returns the machine as far as the run recorded it."""
    result = self.history.result
    devices = result.get('devices')
    return Machine(
      tuple(map(str, devices)) if isinstance(devices, list) else (),
      str(result.get('cpu') or ''),
    )


def _first(mask: np.ndarray, default: int) -> int:
  return int(np.argmax(mask)) if mask.any() else default


def find(arguments: Sequence[str]) -> list[pathlib.Path]:
  """Returns the run directories that arguments name, each once, in order.

  Args:
    arguments: Directories of runs, directories that contain runs, or patterns.

  Raises:
    UserError: A line for each argument that names no run.
  """
  found, problems = [], []
  for argument in arguments:
    path = pathlib.Path(home.expand(argument, 'RUN'))
    if os.path.exists(path) or not glob.has_magic(argument):
      runs = _runs_of(path)
      reason = _no_run(path)
    else:
      matches = sorted(glob.glob(str(path), recursive=True))
      runs = [run for match in matches for run in _runs_of(pathlib.Path(match))]
      reason = 'the pattern matches no run; a run has a config.json'
    found += runs
    if not runs:
      problems.append(f'RUN={argument}: {reason}')
  if problems:
    raise UserError(problems)
  unique: dict[pathlib.Path, pathlib.Path] = {}
  for path in found:
    unique.setdefault(path.resolve(), path)
  return [*unique.values()]


def overlapping(
  runs: Sequence[Run], metric: str
) -> tuple[list[Run], list[Apart]]:
  """Returns the runs with a common step, and runs that ended too early for it.

  Two runs always remain.
  """
  kept, apart = list(runs), []
  ends = {run.workdir: _ends(run, metric) for run in runs}
  while len(kept) > 2:
    late = max(kept, key=lambda run: ends[run.workdir][0])
    short = min(kept, key=lambda run: ends[run.workdir][1])
    first, last = ends[late.workdir][0], ends[short.workdir][1]
    if first <= last:
      break
    kept.remove(short)
    apart.append(
      Apart(
        short.workdir,
        f'its last evaluation, at step {last:g}, is before the first one of '
        f'another run, at step {first:g}',
      )
    )
  return kept, apart


def _ends(run: Run, metric: str) -> tuple[float, float]:
  """Returns the steps of the first and the last finite evaluation."""
  curve = run.curve('steps', metric)
  positions = curve.positions if curve else [np.inf, -np.inf]
  return float(positions[0]), float(positions[-1])


def _runs_of(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the run at `path`, or the runs in that directory."""
  if os.path.exists(path / 'config.json'):
    return [path]
  try:
    return sorted(file.parent for file in path.glob('*/config.json'))
  except OSError:
    return []


def _no_run(path: pathlib.Path) -> str:
  if not os.path.exists(path):
    return 'there is no such directory'
  if not os.path.isdir(path):
    return 'it is a file; it must be the directory of a run'
  return (
    'there is no run; the directory must contain a config.json, or directories '
    'with one'
  )


def read(
  paths: Iterable[pathlib.Path],
) -> tuple[list[Run], list[Apart]]:
  """Returns the runs with an evaluation, and the others with their reasons."""
  runs, apart = [], []
  for path in paths:
    try:
      run = Run(history_lib.read(path))
      for name in {*METRICS.values(), 'steps_per_sec'} & {*run.history.names()}:
        _check_scalars(run.history, name)
    except UserError as error:
      apart.append(Apart(path, '; '.join(error.problems)))
      continue
    if problem := _without_evaluation(run.history):
      apart.append(Apart(path, problem))
      continue
    if run.history.is_running:
      run.remarks.append('still running; compared up to the last evaluation')
    if run.history.config.init_from:
      run.remarks.append('work and time exclude those of the run in init_from')
    runs.append(run)
  return runs, apart


def _check_scalars(history: History, name: str) -> None:
  """Raises a `UserError` if a metric is not a number in each record."""
  if history.series(name).values.ndim > 1:
    raise UserError(
      f'{history.workdir / "metrics.jsonl"}: the file is damaged ({name!r} is '
      'a list)'
    )


def _without_evaluation(history: History) -> str:
  metric = METRICS['nats per token']
  if metric not in history.names():
    return 'there is no evaluation yet'
  losses = history.series(metric).values
  if not np.isfinite(losses[0]):
    return 'the loss of the first evaluation is not finite'
  return ''


def have_equal_tokenizers(runs: Sequence[Run]) -> bool:
  """Returns whether all runs have one tokenizer.

  A run without a vocabulary has that of a run with an equal config.
  """
  known = [run for run in runs if run.vocabulary]
  configs = {run.tokenizer_config() for run in known or runs[:1]}
  for run in runs:
    if not run.vocabulary and known:
      run.remarks.append('its vocabulary is missing; the config is compared')
  return len({run.tokenizer() for run in known}) < 2 and all(
    run.vocabulary or run.tokenizer_config() in configs for run in runs
  )


def on_same_text(runs: Sequence[Run]) -> tuple[list[Run], list[Apart]]:
  """Returns the runs of the most frequent text and split, and the others.

  The earliest of two texts with equally many runs is taken. A run that recorded
  no text is kept with a remark.
  """

  def text_of(run: Run) -> tuple[str, str] | None:
    sha256 = run.history.result.get('corpus_sha256')
    sha256 = sha256 or run.vocabulary.get('corpus_sha256')
    dataset = run.history.config.data.dataset.to_dict()
    return sha256 and (sha256, json.dumps(dataset, sort_keys=True))

  common = _most_frequent(text_of(run) for run in runs)
  same, apart = [], []
  for run in runs:
    text = text_of(run)
    if not text:
      run.remarks.append('no text is recorded; it may be another text')
    if not text or text == common:
      same.append(run)
      continue
    if text[0] != common[0]:
      corpus = run.history.result.get('corpus') or run.vocabulary.get('corpus')
      reason = f'another text: {corpus}, sha256 '
      reason += f'{text[0][:8]}; the others have sha256 {common[0][:8]}'
    else:
      reason = f'another split: data.dataset={text[1]}; the others have '
      reason += common[1]
    apart.append(Apart(run.workdir, reason))
  return same, apart


def _most_frequent(values: Iterable[Any]) -> Any:
  values = [value for value in values if value]
  return max(values, key=values.count, default=None)


def on_same_machine(runs: Sequence[Run]) -> tuple[list[Run], list[Apart]]:
  """Returns the runs whose seconds can be compared, and the others.

  They are those of the most frequent machine. A run of an older version did not
  record its CPU: the devices decide.
  """
  machines = [run.machine() for run in runs]
  common = _most_frequent(
    each for each in machines if each.devices and each.cpu
  ) or _most_frequent(each for each in machines if each.devices)
  same, apart = [], []
  for run, machine in zip(runs, machines, strict=True):
    is_known = machine.cpu and common and common.cpu
    if not machine.devices:
      reason = 'seconds only: the machine is not recorded'
    elif machine.devices != common.devices or (
      is_known and machine.cpu != common.cpu
    ):
      shown = ', '.join(filter(None, [*machine.devices, machine.cpu]))
      reason = f'seconds only: another machine: {shown}'
    else:
      if not machine.cpu:
        run.remarks.append('no CPU is recorded; seconds may be of another CPU')
      same.append(run)
      continue
    apart.append(Apart(run.workdir, reason))
  return same, apart
