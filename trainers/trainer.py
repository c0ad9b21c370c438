"""The training loop. Reading order is execution order."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import nullcontext
import functools
import logging
import pathlib
from typing import Any

from clu import metric_writers, periodic_actions
import jax
import optax

from trainers import memory as memory_lib
from trainers import metrics as metrics_lib
from trainers import step as step_lib
from trainers.board import Board
from trainers.callbacks.callback import Callback, Callbacks
from trainers.checkpoint import (
  Checkpointer,
  SaveError,
  check_fingerprint,
)
from trainers.clock import Clock
from trainers.errors import Interrupted, UserError
from trainers.evaluator import Evaluator
from trainers.metrics import Score
from trainers.prefetch import prefetched
from trainers.signals import Interrupt
from trainers.state import ModelState, Params, TrainState
from trainers.task import Batch, Dataset, Task
from trainers.writers import Writers

log = logging.getLogger(__name__)

# Steps that may be queued on the device: enough to hide the host, few enough
# to stop, and to notice a failure, soon.
RUN_AHEAD = 2


class Trainer:
  """Trains `task` on `dataset`; callbacks do everything that is periodic.

  Hooks get the trainer itself; what they may use is below.

  Attributes:
    task, dataset, callbacks, num_train_steps, batch_size, workdir: as given.
    writer: a CLU MetricWriter, to TensorBoard and whatever was given; there,
      '<split>/<name>' is shown on one chart with the other splits' <name>.
    step: steps done, a host integer: reading it waits for nothing.
    state: the newest TrainState. Donated at the next step: keep no reference.
    metrics: the newest step's, on the device; reading them waits for it.
    score, best: the newest and the best `Score`, or None.
    status: 'running', then 'done', 'interrupted', 'diverged', 'unsaved' (the
      last state could not be saved) or 'failed' (an exception).
    clock: seconds by phase: start, compile, train, evaluate, checkpoint, end.
    num_timed_steps: the steps that took clock.read('train').

  Args:
    ema_decay: as of `make_train_step`; 0: the state has no average.
    eval_weights: 'params', or 'average': what evaluations use.
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
    self.task = task
    self.dataset = dataset
    self.num_train_steps = num_train_steps
    self.batch_size = batch_size
    self.log_interval = log_interval
    self.workdir = workdir
    self.checkpointer = checkpointer
    self.callbacks = Callbacks(callbacks)
    self._writers = Writers(workdir, writers, board)
    self.clock = Clock()
    self.interrupt = Interrupt()
    self.step, self.num_timed_steps = 0, 0
    self.status, self.stop_reason = 'running', ''
    self.score: Score | None = None
    self.best: Score | None = None
    self._optimizer = optimizer
    self._initial = initial
    self._ema_decay = ema_decay
    self._eval_weights = eval_weights
    self._init_key, self._step_key = jax.random.split(jax.random.key(seed))
    # Jitted by itself too: it is traced once for its shapes and its program.
    self._step_fn = jax.jit(
      step_lib.make_train_step(task, optimizer, schedule, ema_decay)
    )
    self._evaluator = Evaluator(task)
    self._memory_hint = memory_hint
    self._memory: memory_lib.StepMemory | None = None  # Until it is compiled.
    self._in_flight: deque[metrics_lib.Metrics] = deque()
    self._unlogged: metrics_lib.Metrics | None = None
    self._next_hook = len(self.callbacks)  # Of this step's; there is no step 0.
    self._may_save = False

  def fit(self) -> str:
    """Trains up to `num_train_steps`, from where a checkpoint left off.

    Returns:
      The status; the exceptions of tasks and callbacks pass through.
    """
    error: BaseException | None = None
    with self.interrupt.listening():
      try:
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
    with prefetched(self._batch, int(self.state.batch_index)) as batches:
      try:
        self._run_hooks()  # Those that the checkpoint was saved before.
        while self.step < self.num_train_steps and self.status == 'running':
          self._train_step(next(batches))
          self._run_hooks()
          self._poll()
      except Interrupted:
        self.stop(str(self.interrupt.name), 'interrupted')

  def _train_step(self, batch: Batch) -> None:
    first = 'compile' not in self.clock.seconds
    with (
      self.clock.phase('compile') if first else nullcontext(),
      jax.profiler.StepTraceAnnotation('train', step_num=self.step + 1),
    ):
      update = self._update.result()
      if first:
        memory_lib.trim()
        self._check_memory(update)
      self.state, self._running, self.metrics = update(
        self.state, self._running, batch, self._step_key
      )
      self._in_flight.append(self.metrics)
      while len(self._in_flight) > (0 if first else RUN_AHEAD):
        jax.block_until_ready(self._in_flight.popleft())
    self._log()  # The step before is done, or nearly: reading costs no wait.
    self.step += 1
    self.num_timed_steps += not first
    self._next_hook = 0
    if self.step % self.log_interval == 0 or self.step == self.num_train_steps:
      self._unlogged, self._running = self._running, self._zeros

  def _check_memory(self, update: jax.stages.Compiled) -> None:
    """Warns in time: where Linux kills a process, nothing more is told."""
    self._memory = memory = memory_lib.measure(update, self.state)
    if memory and not memory.fits:
      log.warning('it may not fit: %s; %s', memory, self._memory_hint(memory))

  def _run_hooks(self) -> None:
    """Each callback once per step, whatever happens between two of them."""
    while self._next_hook < len(self.callbacks):
      self._may_save = True
      try:
        self.callbacks[self._next_hook].on_train_step_end(self)
      finally:
        self._may_save = False
      self._next_hook += 1

  # What hooks may use.

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
        self.eval_params, self.state.model_state, batches, self._poll
      )
      metrics = metrics_lib.prefixed(split, metrics)
    self._each('on_eval_end', split, metrics)
    self._write(metrics)
    return metrics

  def checkpoint(self) -> None:
    """Saves this step, asynchronously. Only on_train_step_end may call it.

    Raises:
      SaveError: the save before did not reach the disk, or this cannot start.
      RuntimeError: another hook called: some of this step's are half done.
    """
    if not self._may_save:
      raise RuntimeError('checkpoint() is for on_train_step_end alone')
    self._save(next_hook=self._next_hook + 1)

  def update_state(self, fn: Callable[[TrainState], TrainState]) -> None:
    """Replaces the state, between two steps, by fn(state)."""
    self.state = fn(self.state)

  def stop(self, reason: str, status: str = 'done') -> None:
    """Ends training after this step; the first reason stands."""
    if self.status == 'running':
      self.status, self.stop_reason = status, reason

  # Start and end.

  def _start(self) -> None:
    batch = self._batch(0)

    def make(key, initial):
      params, model_state = initial or self.task.init(key, batch)
      return TrainState.create(
        params, model_state, self._optimizer, average=self._ema_decay > 0
      )

    # It runs once: compiling it well takes longer than running it badly.
    options = {'xla_backend_optimization_level': 0}
    create = jax.jit(make, compiler_options=options)
    abstract = jax.eval_shape(create, self._init_key, None)
    shapes = jax.eval_shape(self._step_fn, abstract, batch, self._step_key)[1]
    self._zeros = metrics_lib.zeros_like(shapes)
    self._running = self.metrics = self._zeros
    saved = self.checkpointer and self.checkpointer.restore(
      {'state': abstract, 'running': shapes, 'metrics': shapes}
    )
    if saved:
      self._resume(saved.tree, saved.meta)
    if self.step < self.num_train_steps:
      update = jax.jit(
        functools.partial(_accumulate, self._step_fn), donate_argnums=0
      ).lower(abstract, shapes, batch, self._step_key)
      pool = futures.ThreadPoolExecutor(1)
      self._update = pool.submit(update.compile)  # While parameters are made.
      pool.shutdown(wait=False)
    if not saved:
      initial = self._initial and self._initial(
        abstract.params, abstract.model_state
      )
      self.state = create(self._init_key, initial)
    self._writers.start(self.step, saved.meta['metrics_size'] if saved else 0)

  def _resume(self, tree: dict[str, Any], meta: dict[str, Any]) -> None:
    check_fingerprint(meta['fingerprint'], self.dataset.fingerprint)
    self.state, self._running = tree['state'], tree['running']
    self.metrics = tree['metrics']
    self.step = meta['step']
    if self.step > self.num_train_steps:
      raise UserError(
        f'num_train_steps={self.num_train_steps}: this run has done {self.step}'
      )
    # None, or one that is not there any more: all have been called.
    names = [*self.callbacks.names, meta['next_hook']]
    self._next_hook = names.index(meta['next_hook'])
    self.score = meta['score'] and Score(*meta['score'])
    self.best = meta['best'] and Score(*meta['best'])
    self.callbacks.load_state_dict(meta['callbacks'])
    log.info('resuming after step %d', self.step)

  def _save_last(self) -> None:
    """What was trained is kept, unless it diverged or is saved already."""
    self._log()
    if self.status == 'running':
      self.status = 'done'
    if not self.checkpointer or self.status == 'diverged' or not self.step:
      return
    for attempt in range(2):  # The first may report the save before this one.
      try:
        if self.checkpointer.newest != self.step:
          self._save(next_hook=self._next_hook)
        self._confirm()
        return
      except SaveError as error:
        log.error('a checkpoint could not be saved: %s', error)
        if attempt:
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
        except Exception as raised:
          if error:
            log.error('while ending: %r', raised)
          error = error or self._fail(raised)
    return error

  def _fail(self, error: BaseException) -> BaseException:
    error = memory_lib.explained(
      error, self.step, self._memory, self._memory_hint
    )
    self.status = 'failed'
    self.callbacks.on_exception(self, error)
    return error

  # Helpers.

  def _save(self, next_hook: int) -> None:
    if not self.checkpointer:
      raise ValueError('this trainer was given no checkpointer')
    self._log()
    self._confirm()
    jax.block_until_ready(self.state)
    with self.clock.phase('checkpoint'):
      meta = {
        'step': self.step,
        # None: all have been called.
        'next_hook': dict(enumerate(self.callbacks.names)).get(next_hook),
        'fingerprint': self.dataset.fingerprint,
        'metrics_size': self._writers.file_size(),
        'score': self.score,
        'best': self.best,
        'callbacks': self.callbacks.state_dict(),
      }
      tree = {
        'state': self.state,
        'running': self._running,
        'metrics': self.metrics,
      }
      self.checkpointer.save(
        self.step, tree, meta, self.best and self.best.step
      )

  def _confirm(self) -> None:
    """Waits for the save before, and tells that it is on the disk."""
    if self.checkpointer:
      with self.clock.phase('checkpoint'):
        step = self.checkpointer.wait()
      if step is not None:
        self._each('on_checkpoint', step)

  def _batch(self, index: int) -> Batch:
    rows = slice(0, self.batch_size)
    return jax.device_put(self.dataset.train_batch(index, rows))

  def _poll(self) -> None:
    if self.interrupt:
      raise Interrupted

  def _log(self) -> None:
    """Reports the metrics since the last time, if a report is due."""
    if self._unlogged is None:
      return
    metrics, self._unlogged = metrics_lib.compute(self._unlogged), None
    self._each('on_log', metrics)
    self._write(metrics)

  def _write(self, metrics: dict[str, Any]) -> None:
    self._writers.write(self.step, metrics)

  def _each(self, hook: str, *args: Any) -> None:
    may_save, self._may_save = self._may_save, False
    self.callbacks.each(hook, self, *args)
    self._may_save = may_save


def _accumulate(step_fn, state, running, batch, key):
  state, metrics = step_fn(state, batch, key)
  return state, metrics_lib.merge(running, metrics), metrics
