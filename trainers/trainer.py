"""The training loop. Reading order is execution order."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
import dataclasses
import functools
import logging
import pathlib
from typing import Any

from clu import metric_writers, periodic_actions
import jax
import jax.numpy as jnp
import optax

from trainers import learning_rate
from trainers import metrics as metrics_lib
from trainers import step as step_lib
from trainers.callbacks.callback import Callback
from trainers.callbacks.group import Callbacks
from trainers.checkpoint import Checkpointer
from trainers.checkpoint.reader import Saved
from trainers.errors import Interrupted, RollBack, UserError
from trainers.evaluator import Evaluator
from trainers.loop import Loop
from trainers.mesh import Placement
from trainers.metrics import Metrics, Score
from trainers.recovery import Recovery
from trainers.runtime import (
  debugging,
  failures,
  keys,
  processes,
  store,
  watchdog,
)
from trainers.runtime import memory as memory_lib
from trainers.runtime import stop as stop_lib
from trainers.runtime.clock import Clock
from trainers.runtime.prefetch import prefetched
from trainers.signals import Interrupt
from trainers.state import ModelState, Params, TrainState
from trainers.step_runner import StepRunner
from trainers.task import Batch, Dataset, Task
from trainers.writers.run_writer import TensorBoardLayout
from trainers.writers.writers import Writers

log = logging.getLogger(__name__)

# Time for the last save of several processes after one has failed; less than
# the others wait for their own files to be closed.
LAST_SAVE_SECONDS = 3.0


class Trainer(Loop):
  """Trains `task` on `dataset`. Callbacks do everything that is periodic.

  Hooks receive the trainer itself; `Loop` lists what they may use.

  Args:
    task: What is trained.
    dataset: Source of batches.
    optimizer: Optax transformation of gradients.
    num_train_steps: Number of steps, N; training does steps 1 to N.
    batch_size: Rows of the global batch.
    schedule: Learning rate by update, for reports alone.
    seed: Seed of parameters and of the keys of the steps.
    ema_decay: Decay of the average of parameters, as in `make_train_step`; 0
      keeps no average.
    eval_weights: Weights that evaluation uses: 'params' or 'average'.
    spikes: Limit of the loss, as in `make_train_step`.
    accumulate_steps: Number of micro-batches of a batch, as in
      `make_train_step`.
    allow_changed: Names among 'data', 'seed' and 'batch_size' that may differ
      from the checkpoint.
    log_interval: Steps between two logs.
    callbacks: Callbacks and periodic actions of CLU, in the order of calls.
    checkpointer: Writes and reads checkpoints; None keeps none.
    initial: Returns the initial params and model_state, given their shapes;
      None lets the task create them. A checkpoint takes precedence.
    writers: Further metric writers.
    workdir: Directory of the run; None writes no files.
    board: How TensorBoard shows the run.
    memory_hint: Suggests what to change when a step needs too much memory.
    placement: Shardings of the run's arrays; None uses one device.

  Raises:
    ValueError: `eval_weights` is 'average' without an average, or the task
      cannot accumulate gradients.
  """

  def __init__(
    self,
    task: Task,
    dataset: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    num_train_steps: int,
    batch_size: int,
    schedule: optax.Schedule,
    seed: int = 0,
    ema_decay: float = 0.0,
    eval_weights: str = 'params',
    spikes: step_lib.Spikes | None = None,
    accumulate_steps: int = 1,
    allow_changed: Collection[str] = (),
    log_interval: int = 50,
    callbacks: Sequence[Callback | periodic_actions.PeriodicAction] = (),
    checkpointer: Checkpointer | None = None,
    initial: Callable[[Params, ModelState], tuple[Params, ModelState]]
    | None = None,
    writers: Sequence[metric_writers.MetricWriter] = (),
    workdir: pathlib.Path | None = None,
    board: TensorBoardLayout | None = None,
    memory_hint: memory_lib.Hint = lambda _: 'try a smaller batch',
    placement: Placement | None = None,
  ):
    if eval_weights == 'average' and not ema_decay:
      raise ValueError(f'{eval_weights=} needs an ema_decay above 0')
    self.task = task
    self.dataset = dataset
    self.num_train_steps = num_train_steps
    self.batch_size = batch_size
    self.callbacks = Callbacks(callbacks)
    self.checkpointer = checkpointer
    self.log_interval = log_interval
    self.workdir = workdir
    self.placement = placement or Placement()
    self.clock = Clock()
    self.interrupt = Interrupt()
    self._stop = stop_lib.of_run(self.interrupt)
    self.step, self.num_timed_steps, self.num_rollbacks = 0, 0, 0
    self.status, self.stop_reason = 'running', ''
    self.score: Score | None = None
    self.best: Score | None = None
    self._optimizer = optimizer
    self._schedule = schedule
    self._initial = initial
    self._ema_decay = ema_decay
    self._eval_weights = eval_weights
    self._spikes = spikes
    self._evaluator = Evaluator(task, self.placement)
    self._group = processes.group('trainer')
    self._rows = self.placement.rows(batch_size)
    self._writers = (
      Writers(workdir, writers, board) if self.is_first else Writers(None)
    )
    self._unlogged: Metrics | None = None
    self._next_hook = 0
    self._may_save = False
    self._recovery = Recovery(
      checkpointer,
      {'data': dataset.fingerprint, 'seed': seed, 'batch_size': batch_size},
      allow_changed,
      self.clock,
      on_saved=lambda step: self._emit('on_checkpoint', step),
    )
    with keys.pinned():
      init_key, step_key = jax.random.split(keys.make(seed))
    self._init_key = self.placement.put(init_key)
    step_fn = step_lib.make_train_step(
      task, optimizer, schedule, ema_decay, spikes, accumulate_steps
    )
    self._step_runner = StepRunner(
      step_fn, step_key, memory_hint, self.placement
    )

  def fit(self) -> str:
    """Trains up to `num_train_steps`, from the newest checkpoint on.

    Returns:
      The status. Exceptions of tasks and callbacks pass through.
    """
    error: BaseException | None = None
    with (
      keys.pinned(),
      debugging.checked(),
      self.interrupt.listening(),
    ):
      try:
        self._start()
        self._emit('on_fit_start')
        with self.clock.phase('train'):
          self._train()
        self._save_last()
      except BaseException as raised:
        error = self._fail(raised)
      error = self._close(error)
    if error:
      raise error
    return self.status

  def _start(self) -> None:
    """Restores the newest checkpoint, or creates the state of step 0."""
    self._next_hook = len(self.callbacks)  # Step 0 has no hooks.
    batch = self._batch(0)

    def make(key, initial, batch):
      params, model_state = initial or self.task.init(key, batch)
      return TrainState.create(
        params,
        model_state,
        self._optimizer,
        average=self._ema_decay > 0,
        window=self._spikes.window if self._spikes else 0,
      )

    # XLA compiles for longer than this program runs, and it runs once.
    options = {'xla_backend_optimization_level': 0}
    make = jax.jit(make)  # Traced once, for shapes and program.
    abstract = jax.eval_shape(make, self._init_key, None, batch)
    self._shardings = self.placement.shardings(abstract)
    self.placement.report(abstract.params)
    abstract = self.placement.abstract(abstract, self._shardings)
    create = jax.jit(
      make, compiler_options=options, out_shardings=self._shardings
    )
    shapes = self._step_runner.trace(abstract, batch)
    shapes = self.placement.abstract(shapes)
    self.metrics = self._step_runner.accumulated
    self._shapes = {'state': abstract, 'running': shapes, 'metrics': shapes}
    if saved := self._recovery.restore(self._shapes):
      self._load(saved)
      learning_rate.warn_if_raised(
        self._schedule, self.state, self.metrics, self.num_train_steps
      )
    if self.step < self.num_train_steps:
      # Compiles in the background, while the parameters are created.
      self._step_runner.compile(abstract, batch)
    if not saved:
      initial = self._initial and self.placement.put(
        self._initial(abstract.params, abstract.model_state),
        (self._shardings.params, self._shardings.model_state),
      )
      # Operation by operation, making parameters takes a minute.
      with jax.disable_jit(False):
        self.state = create(self._init_key, initial, batch)
      self._writers.start(self.step, 0)

  def _train(self) -> None:
    """Trains to the end, from a good checkpoint again after each rollback."""
    while reason := self._train_until_interrupted():
      if not self._roll_back(reason):
        return

  def _train_until_interrupted(self) -> str | None:
    """Trains to the end, a signal or a rollback.

    Returns:
      The reason of a rollback, or None.
    """
    with prefetched(self._batch, int(self.state.batch_index)) as batches:
      try:
        self._run_hooks()  # Hooks that a restored checkpoint has left to run.
        while self.step < self.num_train_steps and self.status == 'running':
          self._train_step(next(batches))
          self._run_hooks()
          if self.step < self.num_train_steps:
            self.poll()
      except Interrupted:
        self.stop(str(self.interrupt.name), 'interrupted')
      except RollBack as error:
        return str(error)

  def _train_step(self, batch: Batch) -> None:
    first = not self._step_runner.compiled
    with (
      self.clock.phase('compile') if first else nullcontext(),
      jax.profiler.StepTraceAnnotation('train', step_num=self.step + 1),
    ):
      self.state, self.metrics = self._step_runner(self.state, batch)
    self._log()  # The previous step is done by now: reading it does not wait.
    self.step += 1
    self.num_timed_steps += not first
    self._next_hook = 0
    if self.step % self.log_interval == 0 or self.step == self.num_train_steps:
      self._unlogged = self._step_runner.pop_metrics()

  def _run_hooks(self) -> None:
    """Calls each callback once per step, also across a resume."""
    while self._next_hook < len(self.callbacks):
      self._may_save = True
      try:
        self.callbacks[self._next_hook].on_train_step_end(self)
      finally:
        self._may_save = False
      self._next_hook += 1

  # What hooks may use: see `Loop`.

  @property
  def writer(self) -> metric_writers.MetricWriter:
    return self._writers.clu

  @property
  def is_first(self) -> bool:
    return self._group.is_first

  @property
  def eval_params(self) -> Params:
    return getattr(self.state, self._eval_weights)

  def evaluate(self, split: str) -> dict[str, Any]:
    self._log()
    self._writers.splits.add(split)
    jax.block_until_ready(self.state)
    with self.clock.phase('evaluate'):
      batches = self.dataset.eval_batches(split, self._rows)
      metrics = self._evaluator(
        self.eval_params, self.state.model_state, batches, self.poll
      )
      # Hooks decide by them: all processes must see the same.
      metrics = self._group.first(lambda: metrics_lib.prefixed(split, metrics))
    self._emit('on_eval_end', split, metrics)
    self._writers.write(self.step, metrics)
    return metrics

  def checkpoint(self) -> None:
    if not self._may_save:
      raise RuntimeError('checkpoint() is for on_train_step_end alone')
    self._save(self._next_hook + 1)

  def poll(self) -> None:
    watchdog.beat()
    if self._stop.poll():
      raise Interrupted

  def roll_back(self, reason: str) -> None:
    raise RollBack(reason)

  def update_state(self, fn: Callable[[TrainState], TrainState]) -> None:
    self.state = self.placement.put(fn(self.state), self._shardings)

  def stop(self, reason: str, status: str = 'done') -> None:
    if self.status == 'running':
      self.status, self.stop_reason = status, reason

  # Logs and checkpoints.

  def _log(self) -> None:
    """Reports the metrics since the previous log, if a log is due."""
    if self._unlogged is None:
      return
    unlogged, self._unlogged = self._unlogged, None
    metrics = self._group.first(lambda: metrics_lib.compute(unlogged))
    self._emit('on_log', metrics)
    self._writers.write(self.step, metrics)

  def _save(self, next_hook: int, *, is_paused: bool = False) -> None:
    self._log()
    # Before callbacks' states are read: on_checkpoint may change them.
    self._recovery.wait_for_save()
    names = dict(enumerate(self.callbacks.names))
    tree = {
      'state': self.state,
      'running': self._step_runner.accumulated,
      'metrics': self.metrics,
    }
    meta = {
      'num_rollbacks': self.num_rollbacks,
      'next_hook': names.get(next_hook),  # None: all were called.
      'metrics_size': self._writers.file_size(),
      'score': self.score,
      'best': self.best,
      'callbacks': self.callbacks.state_dict(),
    }
    best = self.best and self.best.step
    self._recovery.save(self.step, tree, meta, best, is_paused=is_paused)

  def _load(self, saved: Saved) -> None:
    """Sets everything that a checkpoint holds."""
    tree, meta = saved
    self.state, self._step_runner.accumulated = tree['state'], tree['running']
    recent = self.state.recent_losses
    if debugging.finds_nans() and recent is not None:
      # Older versions marked the empty places of the window with NaN.
      recent = jnp.nan_to_num(recent)
      self.state = dataclasses.replace(self.state, recent_losses=recent)
    self.metrics = tree['metrics']
    self.step, self.num_rollbacks = meta['step'], meta['num_rollbacks']
    if self.step > self.num_train_steps:
      raise UserError(
        f'num_train_steps={self.num_train_steps}: this run has done '
        f'{self.step} steps; it must be at least that'
      )
    # All hooks were called if none is named, or if it is not there any more.
    names = [*self.callbacks.names, meta['next_hook']]
    self._next_hook = names.index(meta['next_hook'])
    self.score = self.best = None
    if self._recovery.has_same_data(saved):
      self.score = meta['score'] and Score(*meta['score'])
      self.best = meta['best'] and Score(*meta['best'])
    self.callbacks.load_state_dict(meta['callbacks'])
    self._writers.start(self.step, meta['metrics_size'])
    log.info('resuming after step %d', self.step)

  def _roll_back(self, reason: str) -> bool:
    """Returns to the newest good checkpoint; without one, stops the run.

    Returns:
      Whether training continues.
    """
    saved = self._recovery.newest_good(self._shapes)
    if not saved:
      self.stop(f'{reason}; no good checkpoint is left', 'diverged')
      return False
    step, batch_index = self.step, self.state.batch_index
    num_rollbacks = self.num_rollbacks + 1
    self._load(saved)
    # A run that resumed with hooks alone left has compiled no step yet.
    self._step_runner.compile(self._shapes['state'], self._batch(0))
    self.state = dataclasses.replace(self.state, batch_index=batch_index)
    self.num_rollbacks, self._unlogged = num_rollbacks, None
    log.warning(
      '%s: rolled back from step %d to %d; training continues on new batches',
      reason,
      step,
      self.step,
    )
    self._emit('on_roll_back')
    return True

  # The end.

  def _save_last(self) -> None:
    """Saves the last step, unless it is saved already or the run diverged."""
    self._log()
    if self.status == 'running':
      self.status = 'done'
    if not self.step and not self.best:  # Nothing has been computed.
      return
    is_paused = self.status == 'interrupted'
    error = self._recovery.save_last(
      self.step,
      lambda: self._save(self._next_hook, is_paused=is_paused),
      diverged=self.status == 'diverged',
    )
    if error:
      self.status, self.stop_reason = 'unsaved', str(error)

  def _fail(self, error: BaseException) -> BaseException:
    error = self._step_runner.explained(failures.explained(error), self.step)
    # Others may wait for this process, which waits for them when it closes.
    failures.report(store.of_run(), error)
    self.status = 'failed'
    self.callbacks.on_exception(self, error)
    return error

  def _close(self, error: BaseException | None) -> BaseException | None:
    """Ends every callback, then closes every file.

    Returns:
      The first error; later ones are logged.
    """
    closers: list[Callable[[], None]] = [
      functools.partial(c.on_fit_end, self) for c in self.callbacks
    ]
    closers.append(lambda: self._writers.close(self.status))
    # Processes that fail together may still finish a save; one alone cannot.
    seconds = LAST_SAVE_SECONDS if error and self._group.size > 1 else None
    closers.append(lambda: self._recovery.close(seconds))
    with self.clock.phase('end'):
      for close in closers:
        try:
          close()
        except BaseException as raised:  # Even SystemExit must not stop others.
          if error:
            log.error('while ending: %r', raised)
          error = error or self._fail(raised)
    return error

  # Helpers.

  def _emit(self, hook: str, *args: Any) -> None:
    """Calls a hook of every callback. No hook but a step's may save."""
    may_save, self._may_save = self._may_save, False
    self.callbacks.emit(hook, self, *args)
    self._may_save = may_save

  def _batch(self, index: int) -> Batch:
    batch = self.dataset.train_batch(index, self._rows)
    return self.placement.put_batch(batch)
