"""Comparison of runs as JSON values."""

from collections.abc import Collection, Mapping, Sequence
import os
import pathlib
from typing import Any

import numpy as np

from nanomoe.comparison import paired
from nanomoe.comparison import remarks as remarks_lib
from nanomoe.comparison import runs as runs_lib
from nanomoe.comparison import work as work_lib
from nanomoe.comparison.curves import AXES, Curve, equal_point
from nanomoe.comparison.runs import METRICS, Apart, Run
from nanomoe.config import schema
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError
from trainers.files import jsonable

# Keys that no configs of a comparison differ in: seeds are paired, and texts
# are compared by their content.
ASIDE = ('seed', 'data.path', 'data.fallback')
# Keys of the work that the summary of a run has.
_WORK = (
  'num_params',
  'num_active_params',
  'flops_per_token',
  'active_flops_per_token',
)


def make(
  arguments: Sequence[str], allow_imports: Collection[str] = ()
) -> dict[str, Any]:
  """Returns the comparison; docs/guides/comparing.md describes its keys.

  Args:
    arguments: Directories and patterns of runs.
    allow_imports: Import paths that the configs of the runs may name.

  Raises:
    UserError: An argument names no run, or a line for each run that cannot be
      compared if fewer than two are left.
  """
  paths = runs_lib.find(arguments)
  names = dict(zip(paths, _names(paths), strict=True))
  runs, apart = runs_lib.read(paths)
  if len(runs) > 1:
    runs, more = work_lib.count(runs, allow_imports)
    apart += more
  runs, more = runs_lib.on_same_text(runs)
  apart += more
  unit = list(METRICS)[not runs_lib.have_equal_tokenizers(runs)]
  metric = METRICS[unit]
  runs, more = _with_metric(runs, metric)
  apart += more
  runs, more = runs_lib.overlapping(runs, metric)
  apart += more
  if len(runs) < 2:
    raise UserError(
      [f'{path}: {reason}' for path, reason in apart]
      + ['a comparison needs at least two different runs that can be compared']
    )
  on_same_machine, of_other_machines = runs_lib.on_same_machine(runs)
  keys, groups = _groups(runs)
  members = {run.workdir: name for name, of in groups.items() for run in of}
  equal = {}
  for axis in AXES:
    of_axis = on_same_machine if axis == 'seconds' else runs
    equal[axis] = _equal(axis, metric, of_axis, groups, names)
  remarks = [
    *remarks_lib.of_runs(runs, names),
    *remarks_lib.unequal_work(groups),
    *remarks_lib.samples(runs),
    *remarks_lib.limits(runs, metric, names),
    *remarks_lib.repeated_seeds(groups),
  ]
  if unit == 'bits per byte':
    remarks.append(
      'the tokenizers differ: equal tokens are different amounts of text'
    )
  return jsonable(
    {
      'metric': metric,
      'unit': unit,
      'keys': keys,
      'groups': [
        {
          'name': name,
          'config': {key: _flat(of[0]).get(key) for key in keys},
          'seeds': sorted({run.history.config.seed for run in of}),
          'runs': [names[run.workdir] for run in of],
          **{key: of[0].work.get(key) for key in _WORK},
        }
        for name, of in groups.items()
      ],
      'runs': [
        _run(
          run,
          names[run.workdir],
          members[run.workdir],
          metric,
          equal,
          has_seconds=run in on_same_machine,
        )
        for run in runs
      ],
      'equal': equal,
      'confidence': paired.CONFIDENCE,
      'assumption': paired.ASSUMPTION,
      'apart': [
        {'name': names[path], 'workdir': str(path), 'reason': reason}
        for path, reason in [*apart, *of_other_machines]
      ],
      'remarks': remarks,
    }
  )


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
  """Returns the shortest ends of paths that differ."""
  parts = [pathlib.Path(os.path.abspath(path)).parts for path in paths]
  for length in range(1, max(map(len, parts), default=0) + 1):
    names = [str(pathlib.Path(*each[-length:])) for each in parts]
    if len(set(names)) == len(names):
      return names
  return [str(path) for path in paths]


def _with_metric(
  runs: Sequence[Run], metric: str
) -> tuple[list[Run], list[Apart]]:
  """Returns the runs with finite values of the metric, and the others."""
  found, apart = [], []
  for run in runs:
    if metric not in run.history.names() or not run.curve('steps', metric):
      apart.append(Apart(run.workdir, f'it did not record {metric}'))
      continue
    values = run.history.series(metric)
    bad = values.steps[~np.isfinite(values.values)]
    if len(bad):
      run.remarks.append(
        f'the loss at step {bad[0]} is not finite; compared up to the '
        'evaluation before'
      )
    found.append(run)
  return found, apart


def _flat(run: Run) -> dict[str, Any]:
  return dict(schema.flatten(run.history.config.to_dict()))


def _content(workdir: str) -> str:
  """Returns a text that is equal for runs that differ only in keys ASIDE.

  It is the path of a run whose config cannot be read.
  """
  try:
    config = workdir_lib.read_config(pathlib.Path(workdir))
  except UserError:
    config = None
  if config is None:
    return workdir
  values = dict(schema.flatten(config.to_dict()))
  return repr([value for key, value in values.items() if key not in ASIDE])


def _groups(runs: Sequence[Run]) -> tuple[list[str], dict[str, list[Run]]]:
  """Returns the keys that differ, and runs with equal values of them by name.

  Names are A, B, ..., Z, A2, B2 and so on.
  """
  configs = [_flat(run) for run in runs]
  sources: dict[str, str] = {}
  files: dict[str, str] = {}
  for run, config in zip(runs, configs, strict=True):
    if source := config.get('init_from'):
      # The seeds of a group can start from the seeds of a source.
      config['init_from'] = sources.setdefault(_content(source), source)
    if file := config.get('data.tokenizer.file'):
      config['data.tokenizer.file'] = files.setdefault(run.tokenizer(), file)
  every = dict.fromkeys(key for config in configs for key in config)
  keys = [
    key
    for key in every
    if key not in ASIDE
    and any(config.get(key) != configs[0].get(key) for config in configs)
  ]
  by_values: dict[str, list[Run]] = {}
  for run, config in zip(runs, configs, strict=True):
    # Numbers that are equal, such as 1 and 1.0, are one value.
    values = [_comparable(config.get(key)) for key in keys]
    by_values.setdefault(repr(values), []).append(run)
  return keys, {
    _letter(index): of for index, of in enumerate(by_values.values())
  }


def _comparable(value: Any) -> Any:
  is_number = isinstance(value, int) and not isinstance(value, bool)
  return float(value) if is_number else value


def _letter(index: int) -> str:
  letter = chr(ord('A') + index % 26)
  return letter if index < 26 else f'{letter}{index // 26 + 1}'


def _equal(
  axis: str,
  metric: str,
  runs: Sequence[Run],
  groups: Mapping[str, Sequence[Run]],
  names: Mapping[pathlib.Path, str],
) -> dict[str, Any]:
  """Returns the losses at the equal point of an axis, by group and by run.

  `reason` says why there is no equal point; it is empty if there is one.
  """
  found = {run.workdir: run.curve(axis, metric) for run in runs}
  curves = {path: curve for path, curve in found.items() if curve}
  point, reason = None, ''
  without = [names[path] for path, curve in found.items() if not curve]
  if len(found) < 2:
    reason = 'fewer than two runs are of one machine'
  elif len(curves) < 2:
    reason = f'fewer than two runs recorded their {axis}'
  else:
    point = equal_point(curves.values())
    reason = '' if point is not None else _apart_in_time(curves, names)
  answer = {
    'point': point,
    'unit': AXES[axis],
    'reason': reason,
    'without': without,
    'groups': {},
    'runs': {},
    'differences': {},
  }
  if point is None:
    return answer
  losses = {path: curve.at(point) for path, curve in curves.items()}
  by_seed = {
    name: seeds
    for name, of in groups.items()
    if (seeds := _by_seed([run for run in of if run.workdir in losses], losses))
  }
  answer['runs'] = {names[path]: loss for path, loss in losses.items()}
  answer['groups'] = {
    name: paired.spread([*seeds.values()])._asdict()
    for name, seeds in by_seed.items()
  }
  first = next(iter(groups))
  if first in by_seed:
    answer['differences'] = {
      name: paired.difference(by_seed[first], seeds)._asdict()
      for name, seeds in by_seed.items()
      if name != first
    }
  return answer


def _apart_in_time(
  curves: Mapping[pathlib.Path, Curve], names: Mapping[pathlib.Path, str]
) -> str:
  late = max(curves, key=lambda path: curves[path].positions[0])
  short = min(curves, key=lambda path: curves[path].positions[-1])
  return (
    f'the first evaluation of {names[late]} is after the last one of '
    f'{names[short]}'
  )


def _by_seed(
  runs: Sequence[Run], losses: Mapping[pathlib.Path, float]
) -> dict[int, float]:
  """Returns the loss of each seed; of a repeated seed, the mean."""
  found: dict[int, list[float]] = {}
  for run in runs:
    seed = run.history.config.seed
    found.setdefault(seed, []).append(losses[run.workdir])
  return {seed: float(np.mean(values)) for seed, values in found.items()}


def _run(
  run: Run,
  name: str,
  group: str,
  metric: str,
  equal: Mapping[str, Mapping[str, Any]],
  *,
  has_seconds: bool,
) -> dict[str, Any]:
  """Returns the summary of a run.

  Args:
    run: The run.
    name: Name of the run.
    group: Name of its group.
    metric: Name of the loss.
    equal: Equal points by axis.
    has_seconds: Whether its seconds can be compared.
  """
  history = run.history
  result = history.result
  curves = {
    axis: run.curve(axis, metric) if axis != 'seconds' or has_seconds else None
    for axis in AXES
  }
  steps, losses = curves['steps'] or history.series(metric)
  return {
    'name': name,
    'workdir': str(run.workdir),
    'group': group,
    'seed': history.config.seed,
    'status': _status(run),
    'step': max(record['step'] for record in history.records),
    'evaluated_step': steps[-1],
    'loss': losses[-1],
    'best_loss': np.nanmin(losses),
    'tokens_per_sec': _tokens_per_sec(run),
    # A running process has not reached its peak.
    'peak_memory_bytes': None
    if history.is_running
    else result.get('peak_memory_bytes'),
    'machine': run.machine()._asdict(),
    **{key: run.work.get(key) for key in _WORK},
    'equal': {axis: equal[axis]['runs'].get(name) for axis in AXES},
    'curves': {
      axis: curve and {'positions': curve.positions, 'losses': curve.losses}
      for axis, curve in curves.items()
    },
  }


def _status(run: Run) -> str:
  if run.history.is_running:
    return 'running'
  status = run.history.result.get('status', 'unknown')
  # A killed process could not write its end.
  return 'killed' if status == 'running' else status


def _tokens_per_sec(run: Run) -> float | None:
  """Returns the speed over all recorded steps, without compilation."""
  if 'steps_per_sec' not in run.history.names():
    return None
  last = run.history.series('steps_per_sec').steps[-1:]
  seconds = run.history.train_seconds(last)
  return float((last * run.tokens_per_step / seconds)[0])
