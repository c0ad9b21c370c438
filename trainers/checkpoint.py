"""Checkpoints: Orbax, behind four verbs: save, wait, restore, close."""

import logging
import math
import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from trainers.errors import UserError

log = logging.getLogger(__name__)


class SaveError(Exception):
  """A checkpoint did not reach the disk."""


class Saved(NamedTuple):
  tree: Any
  meta: dict[str, Any]


class Checkpointer:
  """<directory>/<step>/: arrays by name, and JSON.

  Args:
    directory: absolute; made if missing.
    keep_latest: how many of the newest are kept, beside the best.
  """

  def __init__(self, directory: pathlib.Path, keep_latest: int = 2):
    self._directory = directory
    policy = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(keep_latest),
        checkpoint_managers.BestN(
          get_metric_fn=_score,
          reverse=True,  # Lower is better.
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        best_fn=_score,  # Without it, Orbax does not store the scores.
        preservation_policy=policy,
        cleanup_tmp_directories=True,
        step_name_format=ocp.path.step.standard_name_format(),
      ),
    )
    self.newest: int | None = None  # Saved, or restored, by this object.

  def save(
    self, step: int, tree: Any, meta: dict[str, Any], score: float | None
  ) -> None:
    """Copies, and writes in the background. Replaces a checkpoint of `step`.

    Raises:
      SaveError: the one before did not reach the disk, or this cannot start.
    """
    self.wait()
    arrays = _by_name(tree)
    meta = {'leaves': _leaves(arrays), **meta}
    try:
      if step in self._manager.all_steps():
        self._manager.delete(step)
      self._manager.save(
        step,
        args=ocp.args.Composite(
          arrays=ocp.args.StandardSave(arrays),  # pyright: ignore
          meta=ocp.args.JsonSave(meta),  # pyright: ignore
        ),
        metrics={'score': score},
        force=True,
      )
    except Exception as error:  # Orbax raises what its storage raises.
      raise SaveError(f'step {step}: {error}') from error
    self.newest = step

  def wait(self) -> None:
    """Returns once the last save is on the disk.

    Raises:
      SaveError: it is not.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # Orbax raises what its storage raises.
      step, self.newest = self.newest, None
      raise SaveError(f'step {step}: {error}') from error

  def restore(self, abstract: Any) -> Saved | None:
    """The newest intact checkpoint, or None if there never was one.

    Args:
      abstract: a tree of shapes and types, as the saved one must be.

    Raises:
      UserError: it is of another architecture, or none is intact.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    failures = []
    for step in steps:
      try:
        saved = self._restore(step, abstract)
      except UserError:
        raise
      except Exception as error:  # Whatever damage does to a decoder.
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        failures.append(f'checkpoint {step} is damaged: {reason}')
        continue
      for failure in failures:
        log.warning('%s; using %d', failure, step)
      self.newest = step
      return saved
    if failures:
      hint = 'to start anew, choose another --workdir'
      failures.append(f'none in {self._directory} is intact; {hint}')
      raise UserError(failures)
    return None

  def _restore(self, step: int, abstract: Any) -> Saved:
    meta = self._manager.restore(
      step,
      args=ocp.args.Composite(meta=ocp.args.JsonRestore()),  # pyright: ignore
    )['meta']
    wanted = _by_name(abstract)
    _check_leaves(step, meta['leaves'], _leaves(wanted))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
      for name, x in wanted.items()
    }
    arrays = self._manager.restore(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardRestore(wanted)  # pyright: ignore
      ),
    )['arrays']
    tree = jax.tree.unflatten(
      jax.tree.structure(abstract), [arrays[name] for name in wanted]
    )
    return Saved(tree, meta)

  def close(self) -> None:
    self._manager.close()


def _score(metrics: dict[str, Any]) -> float:
  score = metrics['score']
  return score if score is not None and math.isfinite(score) else math.inf


def _by_name(tree: Any) -> dict[str, Any]:
  """{'state.params.block_0...': leaf}: no container types on the disk."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in leaves
  }


def _leaves(arrays: dict[str, Any]) -> dict[str, str]:
  return {name: f'{x.dtype.name}{list(x.shape)}' for name, x in arrays.items()}


def _check_leaves(step: int, saved: dict[str, str], wanted: dict[str, str]):
  if saved == wanted:
    return
  names = [n for n in saved | wanted if saved.get(n) != wanted.get(n)]
  lines = [
    f'{name} is {saved.get(name, "missing")} in the checkpoint, '
    f'{wanted.get(name, "missing")} in this model'
    for name in names[:5]
  ]
  if len(names) > 5:
    lines.append(f'... and {len(names) - 5} more')
  raise UserError([f'checkpoint {step} is of another architecture:', *lines])
