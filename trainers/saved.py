"""Checkpoints, read: what is there, and whether it is what was saved."""

import hashlib
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from trainers import leaves
from trainers.errors import UserError

log = logging.getLogger(__name__)

_WIDE = ('float64', 'int64', 'uint64', 'complex128')


class Saved(NamedTuple):
  tree: Any
  meta: dict[str, Any]


def read(
  directory: pathlib.Path, step: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """({name: array}, meta) of a checkpoint, as saved; writes nothing.

  Args:
    directory: with the checkpoints of a run.
    step: a number, 'best' (by the monitored metric) or 'latest': the newest
      that is intact.

  Raises:
    UserError: there is no such checkpoint, or it is damaged.
  """
  steps = steps_in(directory)
  if not steps:
    raise UserError(f'{directory}: there is no checkpoint')
  if step == 'latest':
    return _newest(directory, steps, _read)
  number = next((n for n in steps if str(n) == step), None)
  if step == 'best':
    meta = _newest(directory, steps, read_meta)
    number = meta['best'] and meta['best'][0]
  if number not in steps:
    raise UserError(
      f'--step={step}: there is no such checkpoint in {directory}; there are '
      f'{", ".join(map(str, steps))}, best and latest'
    )
  try:
    return _read(directory, number)
  except Exception as error:  # Whatever damage does to a decoder.
    raise UserError(damage(number, error)) from error


def _newest(directory: pathlib.Path, steps: list[int], read_one) -> Any:
  """read_one(directory, step) of the newest where it raises nothing."""
  failures = []
  for step in reversed(steps):
    try:
      found = read_one(directory, step)
    except Exception as error:  # Whatever damage does to a decoder.
      failures.append(damage(step, error))
      continue
    for failure in failures:
      log.warning('%s; using %d', failure, step)
    return found
  raise UserError(failures)


def steps_in(directory: pathlib.Path) -> list[int]:
  names = [path.name for path in directory.glob('*') if path.is_dir()]
  return sorted(int(n) for n in names if n.isdecimal() and str(int(n)) == n)


def _read(directory, step):
  meta = read_meta(directory, step)
  return read_arrays(directory, step, meta), meta


def read_meta(directory: pathlib.Path, step: int) -> dict[str, Any]:
  """Raises ValueError if it changed, and whatever damage does to a decoder."""
  meta = _read_item(directory, step, 'meta', ocp.args.JsonRestore())
  if not isinstance(meta, dict) or 'leaves' not in meta:
    raise ValueError('it is of something else')
  recorded = meta.pop('digest', None)
  if recorded not in (None, digest(meta)):
    raise ValueError('what it tells of itself changed on the disk')
  if meta.get('step', step) != step:
    raise ValueError(f'it is of step {meta["step"]}')
  return meta


def read_arrays(
  directory: pathlib.Path,
  step: int,
  meta: dict[str, Any],
  wanted: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """By name; of the shapes and on the devices of `wanted`.

  Raises ValueError, naming one, if they are not what `meta` says was saved,
  and whatever damage does to a decoder.
  """
  if not jax.config.values[
    'jax_enable_x64'
  ]:  # They would be read as 32-bit ones.
    wide = [n for n, kind in meta['leaves'].items() if kind.startswith(_WIDE)]
    if wide:
      raise ValueError(
        f'{wide[0]} is {meta["leaves"][wide[0]]}: it was saved under '
        'JAX_ENABLE_X64=1, and is read under it alone'
      )
  args = ocp.args.StandardRestore(wanted)  # pyright: ignore
  arrays = _read_item(directory, step, 'arrays', args)
  recorded = meta.get('content', {})  # Older ones have none.
  found = leaves.fingerprints(arrays)
  changed = [name for name in recorded if recorded[name] != found.get(name)]
  if changed:
    more = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    raise ValueError(f'{changed[0]}{more} changed on the disk')
  return arrays


def _read_item(directory, step, name, args):
  handler = {
    'arrays': ocp.StandardCheckpointHandler,
    'meta': ocp.JsonCheckpointHandler,
  }[name]
  with ocp.Checkpointer(handler()) as checkpointer:
    return checkpointer.restore(
      directory.absolute() / str(step) / name, args=args
    )


def digest(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def damage(step: int, error: Exception) -> str:
  return f'checkpoint {step} is damaged: {told(error)}'


def told(error: Exception) -> str:
  return str(error).splitlines()[0] if str(error) else repr(error)
