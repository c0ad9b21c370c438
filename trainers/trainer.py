"""The training loop. Reading order is execution order."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
import dataclasses
import functools
import logging
import pathlib

from clu import metric_writers, periodic_actions
import jax
import jax.numpy as jnp
import optax

from trainers import debugging, identity, keys, learning_rate
from trainers import memory as memory_lib
from trainers import step as step_lib
from trainers.board import Board
from trainers.callbacks.callback import Callback, Callbacks
from trainers.checkpoint import Checkpointer, SaveError
from trainers.errors import Interrupted, RollBack, UserError
from trainers.loop import Loop
from trainers.metrics import Score
from trainers.prefetch import prefetched
from trainers.saved import Saved
from trainers.state import ModelState, Params, TrainState
from trainers.task import Batch, Dataset, Task
from trainers.updater import Updater
from trainers.writers import Writers

log = logging.getLogger(__name__)


class Trainer(Loop):
  """Trains `task` on `dataset`; callbacks do everything that is periodic.

  Hooks get the trainer itself; what they may use is in `Loop`.

  Args:
    ema_decay: as of `make_train_step`; 0: the state has no average.
    eval_weights: 'params', or 'average': what evaluations use.
    spikes: as of `make_train_step`.
    allow_changed: of 'data', 'seed' and 'batch_size', what may be another than
      in the checkpoint.
    initial: called with their shapes where no checkpoint is, returns what
      params and model_state begin as; without it, what the task makes.
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
    allow_changed: Collection[str] = (),
    log_interval: int = 50,
    callbacks: Sequence[Callback | periodic_actions.PeriodicAction] = (),
    checkpointer: Checkpointer | None = None,
    initial: Callable[[Params, ModelState], tuple[Params, ModelState]]
    | None = None,
    writers: Sequence[metric_writers.MetricWriter] = (),
    workdir: pathlib.Path | None = None,
    board: Board | None = None,
    memory_hint: memory_lib.Hint = lambda _: 'try a smaller batch',
  ):
    if eval_weights == 'average' and not ema_decay:
      raise ValueError(f'{eval_weights=} needs an ema_decay above 0')
    super().__init__(
      task,
      dataset,
      num_train_steps=num_train_steps,
      batch_size=batch_size,
      eval_weights=eval_weights,
      callbacks=Callbacks(callbacks),
      writers=Writers(workdir, writers, board),
      workdir=workdir,
    )
    self.log_interval = log_interval
    self.checkpointer = checkpointer
    self._optimizer = optimizer
    self._schedule = schedule
    self._initial = initial
    self._ema_decay = ema_decay
    self._spikes = spikes
    self._identity = {
      'data': dataset.fingerprint,
      'seed': seed,
      'batch_size': batch_size,
    }
    self._allow_changed = allow_changed
    with keys.pinned():
      self._init_key, step_key = jax.random.split(keys.make(seed))
    step_fn = step_lib.make_train_step(
      task, optimizer, schedule, ema_decay, spikes
    )
    self._updater = Updater(step_fn, step_key, memory_hint)

  def fit(self) -> str:
    """Trains up to `num_train_steps`, from where a checkpoint left off.

    Returns:
      The status; the exceptions of tasks and callbacks pass through.
    """
    error: BaseException | None = None
    with (
      keys.pinned(),
      debugging.checked(),
      self.interrupt.listening(),
    ):
      try:
        self._next_hook = len(self.callbacks)  # There is no step 0.
        self._start()
        self._each('on_fit_start')
        with self.clock.phase('train'):
          self._train()
        self._save_last()
      except BaseException as raised:
        error = self._fail(raised)
      error = self._close(error)
    if error:
      raise error
    return self.status

  def _train(self) -> None:
    """To the end; from an earlier step on, where a hook wants that back."""
    while (reason := self._train_on()) and self._went_back(reason):
      pass

  def _train_on(self) -> str | None:
    """To the end, to a signal, or to a RollBack, whose reason is returned."""
    with prefetched(self._batch, int(self.state.batch_index)) as batches:
      try:
        self._run_hooks()  # Those that the checkpoint was saved before.
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
    first = not self._updater.compiled
    with (
      self.clock.phase('compile') if first else nullcontext(),
      jax.profiler.StepTraceAnnotation('train', step_num=self.step + 1),
    ):
      self.state, self.metrics = self._updater(self.state, batch)
    self._log()  # The step before is done, or nearly: reading costs no wait.
    self.step += 1
    self.num_timed_steps += not first
    self._next_hook = 0
    if self.step % self.log_interval == 0 or self.step == self.num_train_steps:
      self._unlogged = self._updater.take()

  def _run_hooks(self) -> None:
    """Each callback once per step, whatever happens between two of them."""
    while self._next_hook < len(self.callbacks):
      self._may_save = True
      try:
        self.callbacks[self._next_hook].on_train_step_end(self)
      finally:
        self._may_save = False
      self._next_hook += 1

  # What hooks may use, beside what `Loop` has.

  def checkpoint(self) -> None:
    """Saves this step, asynchronously. Only on_train_step_end may call it.

    That the save before did not reach the disk is logged.

    Raises:
      SaveError: this one cannot start.
      RuntimeError: another hook called: some of this step's are half done.
    """
    if not self._may_save:
      raise RuntimeError('checkpoint() is for on_train_step_end alone')
    self._save(self._next_hook + 1)

  # Start and end.

  def _start(self) -> None:
    batch = self._batch(0)

    def make(key, initial):
      params, model_state = initial or self.task.init(key, batch)
      return TrainState.create(
        params,
        model_state,
        self._optimizer,
        average=self._ema_decay > 0,
        window=self._spikes.window if self._spikes else 0,
      )

    # It runs once: compiling it well takes longer than running it badly.
    options = {'xla_backend_optimization_level': 0}
    create = jax.jit(make, compiler_options=options)
    abstract = jax.eval_shape(create, self._init_key, None)
    shapes = self._updater.trace(abstract, batch)
    self.metrics = self._updater.running
    self._shapes = {'state': abstract, 'running': shapes, 'metrics': shapes}
    saved = self.checkpointer and self.checkpointer.restore(self._shapes)
    if saved:
      self._resume(saved)
      learning_rate.warn_if_raised(
        self._schedule, self.state, self.metrics, self.num_train_steps
      )
    if self.step < self.num_train_steps:
      self._updater.compile(abstract, batch)  # While parameters are made.
    if not saved:
      initial = self._initial and self._initial(
        abstract.params, abstract.model_state
      )
      # Operation by operation, making parameters takes a minute.
      with jax.disable_jit(False):
        self.state = create(self._init_key, initial)
      self._writers.start(self.step, 0)

  def _resume(self, saved: Saved) -> None:
    tree, meta = saved
    identity.check(meta['identity'], self._identity, self._allow_changed)
    self.state, self._updater.running = tree['state'], tree['running']
    recent = self.state.recent_losses
    if debugging.finds_nans() and recent is not None:
      # Older versions marked the empty places of the window with NaN.
      recent = jnp.nan_to_num(recent)
      self.state = dataclasses.replace(self.state, recent_losses=recent)
    self.metrics = tree['metrics']
    self.step, self.num_rollbacks = meta['step'], meta['num_rollbacks']
    if self.step > self.num_train_steps:
      raise UserError(
        f'num_train_steps={self.num_train_steps}: this run has done {self.step}'
      )
    # None, or one that is not there any more: all have been called.
    names = [*self.callbacks.names, meta['next_hook']]
    self._next_hook = names.index(meta['next_hook'])
    self.score = self.best = None
    if meta['identity']['data'] == self._identity['data']:  # Else, of others.
      self.score = meta['score'] and Score(*meta['score'])
      self.best = meta['best'] and Score(*meta['best'])
    self.callbacks.load_state_dict(meta['callbacks'])
    self._writers.start(self.step, meta['metrics_size'])
    log.info('resuming after step %d', self.step)

  def _went_back(self, reason: str) -> bool:
    """To the newest good checkpoint; False: the run stops, there is none."""
    self._confirm()
    saved = None
    try:
      if self.checkpointer and self.checkpointer.undo():
        saved = self.checkpointer.restore(self._shapes)
    except UserError as error:
      log.error('%s', error)
    if not saved:
      self.stop(f'{reason}; no good checkpoint is left', 'diverged')
      return False
    step, batch_index = self.step, self.state.batch_index
    num_rollbacks = self.num_rollbacks + 1
    self._resume(saved)
    # A run that had but hooks left to run has not begun to.
    self._updater.compile(self._shapes['state'], self._batch(0))
    self.state = dataclasses.replace(self.state, batch_index=batch_index)
    self.num_rollbacks, self._unlogged = num_rollbacks, None
    log.warning(
      '%s: back from step %d to %d, and on with other data',
      reason,
      step,
      self.step,
    )
    self._each('on_roll_back')
    return True

  def _save_last(self) -> None:
    """What was trained is kept, unless it diverged or is saved already."""
    self._log()
    if self.status == 'running':
      self.status = 'done'
    if not self.checkpointer or not self.step:
      return
    error = self._confirm()
    if self.status == 'diverged':
      self.checkpointer.undo()
      return
    for _ in range(2):
      if self.checkpointer.newest == self.step:
        return
      try:
        self._save(self._next_hook, paused=self.status == 'interrupted')
        error = self._confirm()
      except SaveError as raised:
        log.error('a checkpoint could not be saved: %s', raised)
        error = raised
    if self.checkpointer.newest != self.step:
      self.status, self.stop_reason = 'unsaved', str(error)

  def _close(self, error: BaseException | None) -> BaseException | None:
    """Every callback ends, then every file. The first error is the one told."""
    closers: list[Callable[[], None]] = [
      functools.partial(c.on_fit_end, self) for c in self.callbacks
    ]
    closers.append(lambda: self._writers.close(self.status))
    if self.checkpointer:
      closers.append(self.checkpointer.close)
    with self.clock.phase('end'):
      for close in closers:
        try:
          close()
        except BaseException as raised:  # SystemExit too: the others go on.
          if error:
            log.error('while ending: %r', raised)
          error = error or self._fail(raised)
    return error

  def _fail(self, error: BaseException) -> BaseException:
    error = self._updater.explained(error, self.step)
    self.status = 'failed'
    self.callbacks.on_exception(self, error)
    return error

  # Helpers.

  def _save(self, next_hook: int, paused: bool = False) -> None:
    if not self.checkpointer:
      raise ValueError('this trainer was given no checkpointer')
    self._log()
    self._confirm()
    jax.block_until_ready(self.state)
    # Where a signal falls decides nothing: no run goes back to it.
    standing = 'paused' if paused else 'good'
    if int(self.state.skipped_in_a_row):
      standing = 'refused'
    with self.clock.phase('checkpoint'):
      meta = {
        'identity': self._identity,
        'num_rollbacks': self.num_rollbacks,
        # None: all have been called.
        'next_hook': dict(enumerate(self.callbacks.names)).get(next_hook),
        'metrics_size': self._writers.file_size(),
        'score': self.score,
        'best': self.best,
        'callbacks': self.callbacks.state_dict(),
      }
      tree = {
        'state': self.state,
        'running': self._updater.running,
        'metrics': self.metrics,
      }
      self.checkpointer.save(
        self.step,
        tree,
        meta,
        best=self.best and self.best.step,
        standing=standing,
      )

  def _confirm(self) -> SaveError | None:
    """Waits for the save before; tells that it is on the disk, or why not."""
    if not self.checkpointer:
      return None
    try:
      with self.clock.phase('checkpoint'):
        step = self.checkpointer.wait()
    except SaveError as error:
      log.error('a checkpoint could not be saved: %s', error)
      return error
    if step is not None:
      self._each('on_checkpoint', step)
    return None

  def _batch(self, index: int) -> Batch:
    rows = slice(0, self.batch_size)
    return jax.device_put(self.dataset.train_batch(index, rows))
