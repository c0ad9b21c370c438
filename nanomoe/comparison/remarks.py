"""Sentences that a reader of a comparison should know."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics

from nanomoe.comparison.runs import Run

# Relative difference of active parameters from which a remark states it.
_UNEQUAL = 0.05
# The equal point may be so much of the median run before a remark states it.
_SHORT = 0.5


def of_runs(
  runs: Sequence[Run], names: Mapping[pathlib.Path, str]
) -> list[str]:
  """Returns each remark once, behind the names of its runs."""
  found: dict[str, list[str]] = {}
  for run in runs:
    for line in run.remarks:
      found.setdefault(line, []).append(names[run.workdir])
  return [
    f'{", ".join(of) if len(of) < len(runs) else "all runs"}: {line}'
    for line, of in found.items()
  ]


def unequal_work(groups: Mapping[str, Sequence[Run]]) -> list[str]:
  """Returns a remark for each group with other active parameters than A."""
  active = {
    name: of[0].work.get('num_active_params') for name, of in groups.items()
  }
  first = next(iter(groups))
  return [
    f'{name} has {number / active[first]:.2f} times the active parameters of '
    f'{first}'
    for name, number in active.items()
    if number and active[first] and abs(number / active[first] - 1) > _UNEQUAL
  ]


def samples(runs: Sequence[Run]) -> list[str]:
  """Returns a remark if the losses are means over different samples."""

  def sample(run: Run) -> dict[str, object]:
    config = run.history.config
    keys = ['eval_iters', 'block_size']
    # Random windows are drawn in batches; a whole split has no batches.
    keys += ['batch_size'] * (config.eval_iters > 0)
    return {key: getattr(config, key) for key in keys}

  first, *others = map(sample, runs)
  keys = [
    key
    for key in {k: 0 for each in (first, *others) for k in each}
    if any(each.get(key) != first.get(key) for each in others)
  ]
  if not keys:
    return []
  return [
    f'the runs differ in {", ".join(keys)}: their losses are of different '
    'samples of the split'
  ]


def limits(
  runs: Sequence[Run], metric: str, names: Mapping[pathlib.Path, str]
) -> list[str]:
  """Returns a remark if a short run limits the equal step of the others."""
  ends = {
    run.workdir: curve.positions[-1]
    for run in runs
    if (curve := run.curve('steps', metric))
  }
  short = min(ends, key=lambda path: ends[path])
  median = statistics.median(ends.values())
  if ends[short] >= _SHORT * median:
    return []
  return [
    f'{names[short]} limits equal steps to {ends[short]:g}; half of the runs '
    f'have {median:g} or more'
  ]


def repeated_seeds(groups: Mapping[str, Sequence[Run]]) -> list[str]:
  """Returns a remark for each group with several runs of a seed."""
  return [
    f'group {name} has {len(of)} runs of {count} seeds: runs of one seed count '
    'as one, with their mean loss'
    for name, of in groups.items()
    if (count := len({run.history.config.seed for run in of})) < len(of)
  ]
