"""Python functions for notebooks and scripts: train a model, load a run.

`import nanomoe` offers them as `nanomoe.train`, `nanomoe.load` and
`nanomoe.Run`. JAX is imported by the first call that needs it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
import contextlib
import functools
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
import numpy as np

from nanomoe import generate as generate_lib
from nanomoe import main as main_lib
from nanomoe import session
from nanomoe.config import home, resume, schema
from nanomoe.config import overrides as config_lib
from nanomoe.run import history, trusted_imports
from nanomoe.run import workdir as workdir_lib
from nanomoe.run.history import Series
from trainers.errors import UserError

if TYPE_CHECKING:
  import pandas  # pyright: ignore[reportMissingImports]

  from nanomoe.experiment import Restored
  from nanomoe.inspection.trace import Trace


_ADVICE = re.compile(r'give --config\.(\S+); to keep it, leave out --config')


@contextlib.contextmanager
def _as_arguments() -> Iterator[None]:
  """Names arguments in errors as Python does: `workdir`, not `--workdir`."""
  try:
    yield
  except UserError as error:
    advice = r"give overrides={'\1': ...}"
    lines = [_ADVICE.sub(advice, line) for line in error.problems]
    lines = [re.sub(r'(^|[ (])--(?=[a-z])', r'\1', line) for line in lines]
    raise UserError(lines) from error


class Run:
  """Run in a directory: its config, its metrics and its trained model.

  The weights are read when they are first needed, and kept.

  Args:
    workdir: Directory of the run.
    step: Step of the checkpoint: a number, 'best' or 'latest'.
    allow_imports: Import paths of plug-ins that the run may name. Paths that
      you have used before are always allowed.

  Attributes:
    workdir: Directory of the run.
    config: Config of the run, with every key.

  Raises:
    UserError: There is no run in `workdir`, its config.json is damaged, or it
      names a plug-in that is not allowed.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    step: str | int = 'best',
    allow_imports: Collection[str] = (),
  ):
    with _as_arguments():
      self.workdir = _path(workdir)
      self.config: schema.Config = workdir_lib.config_of(self.workdir)
      trusted_imports.check(
        trusted_imports.paths(
          self.config.to_dict(), trusted_imports.OF_A_MODEL
        ),
        allow_imports,
      )
    self._step = str(step)
    self._allow_imports = frozenset(allow_imports)

  @property
  def result(self) -> Mapping[str, Any]:
    """Content of result.json: status, losses, speed, versions and more."""
    return history.read(self.workdir).result

  @property
  def status(self) -> str:
    """Status of the run, such as 'running', 'done' or 'interrupted'.

    A process that was killed leaves 'interrupted': the run can resume.
    """
    found = history.read(self.workdir)
    if found.is_running:
      return 'running'
    status = found.result.get('status', 'running')
    return 'interrupted' if status == 'running' else status

  @property
  def step(self) -> int:
    """Step of the checkpoint with the weights."""
    return self._restored.step

  @property
  def params(self) -> Any:
    """Parameters that the run evaluates, as a nested dict of arrays."""
    return self._restored.params

  def metrics(
    self, *, frame: bool = False
  ) -> dict[str, Series] | pandas.DataFrame:
    """Returns the recorded metrics.

    Args:
      frame: Whether to return a DataFrame of pandas, which must be installed.

    Returns:
      `{name: (steps, values)}` as NumPy arrays, such as
      `steps, loss = run.metrics()['val/cross_entropy']`. A metric with one
      value per layer has `values` of shape `[records, layers]`. A DataFrame has
      the steps as its index, NaN where a metric was not recorded, and columns
      such as 'val/load_entropy/0' for layer 0.

    Raises:
      UserError: A file of the run is damaged, or pandas is not installed.
    """
    found = history.read(self.workdir)
    if frame:
      return found.frame()
    return found.all_series()

  def generate(
    self,
    prompt: str = '\n',
    num_tokens: int = 500,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
  ) -> str:
    """Returns a prompt with its continuation.

    Args:
      prompt: Text to continue.
      num_tokens: Number of tokens to generate.
      temperature: Divisor of the logits; 0 takes the most likely token.
      top_k: Number of most likely tokens to draw from; 0 means all.
      top_p: Probability mass of the most likely tokens to draw from; 1 means
        all.
      seed: Random seed of the draws.

    Raises:
      UserError: A number is out of its range, the prompt is empty or has a
        character without a token, or the model is not causal.
    """
    with _as_arguments():
      numbers = generate_lib.checked(
        num_tokens=num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
      )
      (prompt,) = generate_lib.checked_prompts([prompt])
      pieces = generate_lib.pieces(
        self._generator, self._restored.tokenizer, [prompt], numbers
      )
      return prompt + ''.join(piece for (piece,) in pieces)

  def loss(self, text: str) -> float:
    """Returns the cross-entropy of a text, in nats per token.

    The first token of the text is context alone. Windows of `block_size`
    tokens follow each other, as in `nanomoe evaluate --data=FILE`.

    Args:
      text: Text of at least two tokens.

    Raises:
      UserError: The text is too short or has a character without a token.
    """
    with _as_arguments():
      generate_lib.check_utf8('text', text)
      restored = self._restored
      from nanomoe.data import pipeline  # noqa: PLC0415 (JAX takes seconds)

      rows = slice(0, self.config.batch_size)
      try:
        tokens = pipeline.whole(text, restored.tokenizer, self.config, '')
      except UserError as error:
        raise UserError(f'text={_shown(text)}: {error}') from error
      metrics = self._evaluator(
        restored.params,
        restored.model_state,
        tokens.eval_batches(pipeline.WHOLE, rows),
      )
      return metrics['cross_entropy']

  def routing(self, text: str) -> Trace:
    """Returns the experts and the weights of each token, by layer.

    Args:
      text: Text of at least one token.

    Raises:
      UserError: The text is empty or has a character without a token, or no
        layer of the model has experts.
    """
    with _as_arguments():
      generate_lib.check_utf8('text', text)
      restored = self._restored
      from nanomoe.inspection import trace  # noqa: PLC0415 (JAX takes seconds)
      from nanomoe.moe.dispatch import registry  # noqa: PLC0415

      moe = self.config.moe
      drops = registry.eval_dispatch(moe) == 'capacity'
      try:
        return trace.trace(
          restored.task,
          restored.params,
          restored.model_state,
          np.asarray(restored.tokenizer.encode(text)),
          block_size=self.config.block_size,
          batch_size=self.config.batch_size,
          capacity_factor=moe.capacity_factor if drops else None,
        )
      except UserError as error:
        raise UserError(f'text={_shown(text)}: {error}') from error

  def tokens(self, text: str) -> list[str]:
    """Returns the text of each token, in the order of `routing`.

    Args:
      text: Text to cut into tokens.

    Raises:
      UserError: The text has a character without a token.
    """
    with _as_arguments():
      generate_lib.check_utf8('text', text)
      tokenizer = self._restored.tokenizer
      return [tokenizer.decode([t]) for t in tokenizer.encode(text).tolist()]

  def resume(
    self,
    overrides: Mapping[str, Any] | None = None,
    *,
    allow_changed: Collection[str] = (),
    progress: bool = True,
  ) -> Run:
    """Trains from the newest checkpoint to the end; returns the run anew.

    Args:
      overrides: Changed keys, as in `train`. A larger `num_train_steps`
        continues a run that is done.
      allow_changed: Names of `nanomoe train --allow_changed` that may differ.
      progress: Whether to show the progress.

    Raises:
      UserError: A change is not allowed, or the run cannot resume.
      KeyboardInterrupt: A signal stopped the run, which is saved.
    """
    with _as_arguments():
      named = trusted_imports.paths(self.config.to_dict())
      trusted_imports.check(named, self._allow_imports)
    return train(
      self.config,
      self.workdir,
      overrides=overrides,
      allow_changed=allow_changed,
      progress=progress,
    )

  def __repr__(self) -> str:
    found = self.result
    facts = [
      self.status,
      f'step {found.get("step", 0)}/{self.config.num_train_steps}',
    ]
    if found.get('best_step') is not None:
      value, step = found['best_val_loss'], found['best_step']
      facts.append(f'best val {value:.4f} at step {step}')
    return f'<Run {str(self.workdir)!r}: {", ".join(facts)}>'

  @functools.cached_property
  def _restored(self) -> Restored:
    with _as_arguments():
      session.start()
      from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)

      return experiment.restore(self.config, self.workdir, self._step)

  @functools.cached_property
  def _generator(self) -> Any:
    restored = self._restored
    from nanomoe.model import build  # noqa: PLC0415 (JAX takes seconds)
    from nanomoe.sampling import Generator  # noqa: PLC0415

    if reason := build.generation_problem(self.config):
      raise UserError(f'no text can be generated: {reason}')
    trained = restored.params, restored.model_state
    return Generator(restored.task.logits, trained, self.config.block_size)

  @functools.cached_property
  def _evaluator(self) -> Any:
    task = self._restored.task
    from trainers.evaluator import Evaluator  # noqa: PLC0415

    return Evaluator(task)


def load(
  workdir: str | os.PathLike[str],
  *,
  step: str | int = 'best',
  allow_imports: Collection[str] = (),
) -> Run:
  """Returns the run in a directory, which may still be training.

  Args:
    workdir: Directory of the run.
    step: Step of the checkpoint: a number, 'best' or 'latest'.
    allow_imports: Import paths of plug-ins that the run may name. Paths that
      you have used before are always allowed.

  Raises:
    UserError: There is no run in `workdir`, its config.json is damaged, or it
      names a plug-in that is not allowed.
  """
  return Run(workdir, step, allow_imports)


def train(
  config: ConfigDict | Mapping[str, Any] | str | os.PathLike[str],
  workdir: str | os.PathLike[str],
  *,
  overrides: Mapping[str, Any] | None = None,
  allow_changed: Collection[str] = (),
  progress: bool = True,
) -> Run:
  """Trains a model, or resumes the run in `workdir`, in this process.

  The first Ctrl-C, or interrupt of a notebook's kernel, saves the run and
  raises KeyboardInterrupt. A thread that is not the main one receives no
  signals, and the run trains on.

  Args:
    config: Whole config as a ConfigDict, path of a config file such as
      'configs/quick.py', or a dict of keys that differ from configs/base.py.
    workdir: Directory of the run. A run in that directory is resumed.
    overrides: Values by key, such as `{'moe.top_k': 1}`; they take precedence
      over `config`. Sections may be nested dicts.
    allow_changed: Names of `nanomoe train --allow_changed` that may differ from
      the run that is resumed.
    progress: Whether to show the progress: a bar in a notebook or a terminal,
      lines on standard error otherwise. Warnings are always shown.

  Returns:
    The run, whose `status` is 'done' unless training failed to converge or to
    save, as the log says.

  Raises:
    UserError: A line for each mistake in the config, the data or the directory;
      nothing was written. Or another run is training in this process.
    KeyboardInterrupt: A signal stopped the run. If it has begun, the last step
      is saved, and `nanomoe.load(workdir).resume()` continues.
  """
  with _as_arguments():
    workdir = _path(workdir)
    base, pairs = _base(config)
    pairs += config_lib.from_values(overrides or {})
    old = workdir_lib.read_config(workdir)
    whole = main_lib.checked(base, pairs, workdir, is_new=old is None)
    if old:
      named = [key for key, _ in pairs]
      whole = resume.resume_config(old, whole, named, allow_changed)
    session.fit(whole, workdir, allow_changed, progress=progress)
  # The caller has named the plug-ins of this config.
  return Run(workdir, allow_imports=trusted_imports.paths(whole.to_dict()))


def _base(
  config: ConfigDict | Mapping[str, Any] | str | os.PathLike[str],
) -> tuple[schema.Config, list[config_lib.Override]]:
  """Returns the config that overrides apply to, and the first overrides."""
  if isinstance(config, ConfigDict):
    return config_lib.plain(config), []
  if isinstance(config, Mapping):
    base = config_lib.load_file('configs/base.py')
    return base, config_lib.from_values(config)
  return config_lib.load_file(os.fspath(config)), []


def _path(workdir: str | os.PathLike[str]) -> pathlib.Path:
  return pathlib.Path(home.expand(os.fspath(workdir), '--workdir'))


def _shown(text: str) -> str:
  return repr(text if len(text) <= 40 else f'{text[:40]}...')
