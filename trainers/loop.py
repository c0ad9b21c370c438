"""A run in progress, as hooks see it."""

from collections.abc import Callable
import pathlib
from typing import Any, Protocol

from clu import metric_writers

from trainers.metrics import Metrics, Score
from trainers.runtime.clock import Clock
from trainers.state import Params, TrainState
from trainers.task import Dataset, Task


class Loop(Protocol):
  """Contract between `Trainer`, which implements it, and the hooks.

  Attributes:
    task, dataset, num_train_steps, batch_size, workdir: As given to `Trainer`.
    step: Number of steps done, a host integer. Reading it waits for nothing.
    state: Newest TrainState. The next step donates it: keep no reference.
    metrics: Metrics of the newest step, on the device. Reading them waits.
    score: Newest `Score` of an evaluation, or None.
    best: Best `Score` so far, or None.
    status: 'running', then 'done', 'interrupted', 'diverged', 'unsaved' (the
      last state could not be saved), 'failed' (an exception), or the status
      that a callback gave to `stop`.
    stop_reason: Reason that was given to `stop`, or ''.
    clock: Seconds by phase: start, compile, train, evaluate, checkpoint, end.
    num_timed_steps: Number of steps that took `clock.read('train')` seconds.
    num_rollbacks: Number of times that the run returned to an earlier step.
  """

  task: Task
  dataset: Dataset
  num_train_steps: int
  batch_size: int
  workdir: pathlib.Path | None
  step: int
  state: TrainState
  metrics: Metrics
  score: Score | None
  best: Score | None
  status: str
  stop_reason: str
  clock: Clock
  num_timed_steps: int
  num_rollbacks: int

  @property
  def writer(self) -> metric_writers.MetricWriter:
    """CLU MetricWriter to TensorBoard and to the writers that were given.

    On processes other than the first it ignores all calls.
    TensorBoard shows '<split>/<name>' on one chart with <name> of the other
    splits.
    """
    ...

  @property
  def is_first(self) -> bool:
    """True on the first process of a run, which alone writes files.

    Every process calls every hook in the same order. A hook of another process
    must make the same calls of the loop, and may leave out its own files.
    """
    ...

  @property
  def eval_params(self) -> Params:
    """Parameters that evaluation uses: `state.params` or their average."""
    ...

  def evaluate(self, split: str) -> dict[str, Any]:
    """Evaluates on one pass over `split`; writes and reports the metrics.

    Returns:
      {'<split>/<metric>': value}.

    Raises:
      Interrupted: A signal arrived. The hooks of this step run again when the
        run resumes.
    """
    ...

  def checkpoint(self) -> None:
    """Saves this step asynchronously. Only `on_train_step_end` may call it.

    A failure of the previous save is logged.

    Raises:
      SaveError: This save cannot start.
      RuntimeError: Another hook called: this step has unfinished hooks.
    """
    ...

  def poll(self) -> None:
    """Checks for a signal. Long actions in `on_train_step_end` call it.

    Raises:
      Interrupted: A signal arrived. This hook and those listed after it run
        again when the run resumes.
    """
    ...

  def roll_back(self, reason: str) -> None:
    """Ends this step; the run returns to the newest good checkpoint.

    A checkpoint is good if its newest update was accepted and no signal caused
    it. Training continues on batches that it has not seen.

    Raises:
      RollBack: Always.
    """
    ...

  def update_state(self, fn: Callable[[TrainState], TrainState]) -> None:
    """Replaces the state by fn(state) between two steps."""
    ...

  def stop(self, reason: str, status: str = 'done') -> None:
    """Ends training after this step. The first reason stands."""
    ...
