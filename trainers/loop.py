"""A run in progress, as callbacks see it."""

from collections.abc import Callable
import pathlib
from typing import Any

from clu import metric_writers
import jax

from trainers import metrics as metrics_lib
from trainers.callbacks.callback import Callbacks
from trainers.clock import Clock
from trainers.errors import Interrupted, RollBack
from trainers.evaluator import Evaluator
from trainers.metrics import Metrics, Score
from trainers.signals import Interrupt
from trainers.state import Params, TrainState
from trainers.task import Dataset, Task
from trainers.writers.writers import Writers


class Loop:
  """What hooks may use; `Trainer` runs it.

  Attributes:
    task, dataset, callbacks, num_train_steps, batch_size, workdir: as given.
    writer: a CLU MetricWriter, to TensorBoard and whatever was given; there,
      '<split>/<name>' is shown on one chart with the other splits' <name>.
    step: steps done, a host integer: reading it waits for nothing.
    state: the newest TrainState. Donated at the next step: keep no reference.
    metrics: the newest step's, on the device; reading them waits for it.
    score, best: the newest and the best `Score`, or None.
    status: 'running', then 'done', 'interrupted', 'diverged', 'unsaved' (the
      last state could not be saved), 'failed' (an exception), or a callback's.
    clock: seconds by phase: start, compile, train, evaluate, checkpoint, end.
    num_timed_steps: the steps that took clock.read('train').
    num_rollbacks: how often the run went back to an earlier step.
  """

  state: TrainState
  metrics: Metrics

  def __init__(
    self,
    task: Task,
    dataset: Dataset,
    *,
    num_train_steps: int,
    batch_size: int,
    eval_weights: str,
    callbacks: Callbacks,
    writers: Writers,
    workdir: pathlib.Path | None,
  ):
    self.task = task
    self.dataset = dataset
    self.num_train_steps = num_train_steps
    self.batch_size = batch_size
    self.callbacks = callbacks
    self.workdir = workdir
    self.clock = Clock()
    self.interrupt = Interrupt()
    self.step, self.num_timed_steps, self.num_rollbacks = 0, 0, 0
    self.status, self.stop_reason = 'running', ''
    self.score: Score | None = None
    self.best: Score | None = None
    self._eval_weights = eval_weights
    self._evaluator = Evaluator(task)
    self._writers = writers
    self._unlogged: Metrics | None = None
    self._may_save = False

  @property
  def writer(self) -> metric_writers.MetricWriter:
    return self._writers.clu

  @property
  def eval_params(self) -> Params:
    """What evaluations use: of `state`, its params or their average."""
    return getattr(self.state, self._eval_weights)

  def evaluate(self, split: str) -> dict[str, Any]:
    """One pass over `split`; {'<split>/<metric>': value}, written and reported.

    Raises:
      Interrupted: a signal arrived; this step's hooks run again on resume.
    """
    self._log()
    self._writers.splits.add(split)
    jax.block_until_ready(self.state)
    with self.clock.phase('evaluate'):
      batches = self.dataset.eval_batches(split, slice(0, self.batch_size))
      metrics = self._evaluator(
        self.eval_params, self.state.model_state, batches, self.poll
      )
      metrics = metrics_lib.prefixed(split, metrics)
    self._emit('on_eval_end', split, metrics)
    self._write(metrics)
    return metrics

  def poll(self) -> None:
    """What takes long calls it, in on_train_step_end.

    Raises:
      Interrupted: a signal arrived; this hook, and what is listed after it, run
        again on resume.
    """
    if self.interrupt:
      raise Interrupted

  def roll_back(self, reason: str) -> None:
    """Ends this step: the run goes back to the newest good checkpoint.

    Good is one whose newest update was accepted, and that no signal caused.
    What is trained on next was not seen before.
    """
    raise RollBack(reason)

  def update_state(self, fn: Callable[[TrainState], TrainState]) -> None:
    """Replaces the state, between two steps, by fn(state)."""
    self.state = fn(self.state)

  def stop(self, reason: str, status: str = 'done') -> None:
    """Ends training after this step; the first reason stands."""
    if self.status == 'running':
      self.status, self.stop_reason = status, reason

  # For `Trainer`.

  def _log(self) -> None:
    """Reports the metrics since the last time, if a report is due."""
    if self._unlogged is None:
      return
    metrics, self._unlogged = metrics_lib.compute(self._unlogged), None
    self._emit('on_log', metrics)
    self._write(metrics)

  def _write(self, metrics: dict[str, Any]) -> None:
    self._writers.write(self.step, metrics)

  def _emit(self, hook: str, *args: Any) -> None:
    may_save, self._may_save = self._may_save, False
    self.callbacks.each(hook, self, *args)
    self._may_save = may_save
