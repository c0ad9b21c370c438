"""The composition root: where model, trainer and config meet."""

from collections.abc import Collection
import functools
import logging
import pathlib
from typing import Any, NamedTuple

from clu.metric_writers import MetricWriter
from clu.periodic_actions import PeriodicAction
import jax
import numpy as np

from nanomoe import optimizers
from nanomoe.callbacks import (
  AuxWeight,
  Records,
  RoutingAlarm,
  TextSample,
  pictures,
)
from nanomoe.config import schema
from nanomoe.config.overrides import Config
from nanomoe.data import pipeline as text_lib
from nanomoe.data import tokenizers
from nanomoe.data.pipeline import VOCABULARY
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.model import parameters
from nanomoe.model.build import generation_problem, layers_with_experts
from nanomoe.moe.dispatch import registry
from nanomoe.ops import matmul
from nanomoe.run import (
  charts,
  memory_hint,
  provenance,
  trusted_imports,
  workdir,
)
from nanomoe.task import LanguageModel, build_task
from trainers import callbacks, spec
from trainers.callbacks.callback import Callbacks
from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import checkpointer, reader
from trainers.errors import UserError
from trainers.step import Spikes
from trainers.trainer import Trainer

log = logging.getLogger(__name__)

CALLBACKS = {
  **{name: getattr(callbacks, name) for name in callbacks.__all__},
  'RoutingAlarm': RoutingAlarm,
}
# Tokens whose experts are counted and drawn: a picture has a column for each.
MAX_WATCHED = 128


def build(
  config: Config,
  directory: pathlib.Path,
  allow_changed: Collection[str] = (),
) -> Trainer:
  """The trainer that `config` describes; `.fit()` runs it.

  Writes config.json, with what is decided here, and vocabulary.json: those of
  a run that goes on once its checkpoint is found to fit.

  Args:
    config: whole.
    directory: of the run.
    allow_changed: of workdir.ALLOWABLE, what need not be as the checkpoint has
      it.

  Raises:
    UserError: what is wrong with the config, the data or the directory.
  """
  if lines := schema.problems(config.to_dict()):
    raise UserError(lines)
  config = resolve_auto(config)
  corpus, tokenizer, dataset = text_lib.read(config, directory, allow_changed)
  token_bytes = tokenizer.token_bytes()
  watched = text_lib.frequent(dataset, token_bytes, MAX_WATCHED)
  task = build_task(config, tokenizer.vocab_size, token_bytes, watched)
  optimizer, schedule = optimizers.build(
    config.optimizer, config.num_train_steps
  )
  batch = dataset.train_batch(0, slice(0, config.batch_size))
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  facts = {
    'corpus': corpus.name,
    'corpus_sha256': corpus.fingerprint,
    'num_characters': len(corpus.text),
    'vocab_size': tokenizer.vocab_size,
    'dispatch': config.moe.dispatch,
    'eval_dispatch': registry.eval_dispatch(config),
    **parameters.count(params, config.moe.top_k),
    **provenance.facts(),
  }
  recorded = {
    'type': config.data.tokenizer.type,
    'corpus': corpus.name,
    'corpus_sha256': corpus.fingerprint,
  }
  records = Records(
    {
      directory / 'config.json': config.to_dict(),
      directory / VOCABULARY: {**tokenizer.state_dict(), **recorded},
    }
  )
  trainer = Trainer(
    task,
    dataset,
    optimizer,
    schedule=schedule,
    seed=config.seed,
    num_train_steps=config.num_train_steps,
    batch_size=config.batch_size,
    log_interval=config.log_interval,
    ema_decay=config.optimizer.ema_decay,
    eval_weights=config.eval_weights,
    spikes=Spikes(config.optimizer.spike_factor, config.optimizer.spike_window),
    # Other tokens are other data.
    allow_changed=[
      *allow_changed,
      *(['data'] * ('tokenizer' in allow_changed)),
    ],
    callbacks=[
      records,
      *build_callbacks(
        config, directory, task, tokenizer, str(corpus.text[:1]), facts
      ),
    ],
    checkpointer=checkpointer.Checkpointer(
      directory.absolute() / 'checkpoints', config.checkpoint.keep_latest
    ),
    initial=functools.partial(_weights_of, pathlib.Path(config.init_from))
    if config.init_from
    else None,
    writers=build_writers(config, directory),
    workdir=directory,
    board=charts.of(config),
    memory_hint=functools.partial(memory_hint.hint, config),
  )
  trusted_imports.remember(trusted_imports.paths(config.to_dict()))
  if workdir.read_config(directory) is None:
    records.write()
  log.info(
    'corpus: %s, %s characters, %s for %d tokens, sha256 %s',
    corpus.name,
    f'{len(corpus.text):,}',
    config.data.tokenizer.type,
    tokenizer.vocab_size,
    corpus.fingerprint[:16],
  )
  log.info(
    'model: %s parameters, %s of them active for a token; dispatch %s, in '
    'evaluation %s; %s products, on %s',
    f'{facts["num_params"]:,}',
    f'{facts["num_active_params"]:,}',
    facts['dispatch'],
    facts['eval_dispatch'],
    config.precision,
    ', '.join(facts['devices']),
  )
  if problem := generation_problem(config):
    log.warning('%s; no text is sampled', problem)
  return trainer


class Restored(NamedTuple):
  """A trained model, of the weights that its run evaluates.

  What it was trained on is told by `identity`.
  """

  task: LanguageModel
  tokenizer: Tokenizer
  params: Any
  model_state: Any
  step: int
  identity: dict[str, Any]


def restore(config: Config, directory: pathlib.Path, step: str) -> Restored:
  """What `step` (a number, best or latest) of the run in `directory` holds.

  Raises:
    UserError: there is no such checkpoint, or the vocabulary is damaged.
  """
  arrays, meta = reader.read(directory / 'checkpoints', step)
  tokenizer = tokenizers.load(
    config.data.tokenizer.to_dict(), directory / VOCABULARY
  )
  task = build_task(config, tokenizer.vocab_size, tokenizer.token_bytes())
  batch = {'inputs': np.zeros((1, config.block_size), np.int32)}
  params, model_state = jax.eval_shape(task.init, jax.random.key(0), batch)
  return Restored(
    task,
    tokenizer,
    arrays_lib.subtree(arrays, f'state.{config.eval_weights}', params),
    arrays_lib.subtree(arrays, 'state.model_state', model_state),
    meta['step'],
    meta['identity'],
  )


def resolve_auto(config: Config) -> Config:
  """A copy without 'auto': what a resumed run must find decided."""
  config = config.copy_and_resolve_references()
  config.precision = matmul.resolve_precision(config.precision)
  for key in ('dispatch', 'eval_dispatch'):
    config.moe[key] = registry.resolve_dispatch(config.moe[key])
  return config


def _weights_of(source: pathlib.Path, params: Any, model_state: Any) -> Any:
  """The best params and model_state of the run in `source`."""
  arrays, meta = reader.read(source / 'checkpoints', 'best')
  config = workdir.read_config(source) or {}
  weights = config.get('eval_weights', 'params')  # An older run has no choice.
  log.info('starting from step %d of %s', meta['step'], source)
  try:
    return (
      arrays_lib.subtree(arrays, f'state.{weights}', params),
      arrays_lib.subtree(arrays, 'state.model_state', model_state),
    )
  except UserError as error:
    lines = [f'init_from={source}: its weights do not fit this model']
    raise UserError(lines + error.problems) from error


def build_callbacks(
  config: Config,
  directory: pathlib.Path,
  task: LanguageModel,
  tokenizer: Tokenizer,
  prompt: str,
  facts: dict[str, Any],
) -> list[callbacks.Callback]:
  """In the order in which they are called."""
  tokens_per_step = config.batch_size * config.block_size
  plugins = spec.build_group(
    'callbacks',
    config.callbacks.to_dict(),
    CALLBACKS,
    (callbacks.Callback, PeriodicAction),
    num_experts=config.moe.num_experts,
    top_k=config.moe.top_k,
  )
  try:
    plugins = Callbacks(plugins)
  except ValueError as error:
    raise UserError(f'callbacks: {error}') from error
  sample = TextSample(
    task.logits,
    directory / 'sample.txt',
    tokenizer,
    prompt=tokenizer.encode(prompt).tolist(),
    block_size=config.block_size,
    seed=config.seed,
    **config.sample.to_dict(),
  )
  return [
    AuxWeight(config.moe.aux_weight),
    callbacks.ParameterOverview(),
    callbacks.Progress(tokens_per_step),
    *(pictures(task, tokenizer) if layers_with_experts(config) else []),
    callbacks.Evaluation(config.eval_interval, monitor='cross_entropy'),
    *plugins,
    callbacks.Checkpoints(config.eval_interval),
    *([] if generation_problem(config) else [sample]),
    callbacks.Result(
      facts,
      tokens_per_step,
      monitor='cross_entropy',
      val_metrics={
        'val_bits_per_char': 'bits_per_char',
        'val_bits_per_byte': 'bits_per_byte',
      },
    ),
  ]


def build_writers(
  config: Config, directory: pathlib.Path
) -> list[MetricWriter]:
  return spec.build_group(
    'writers', config.writers.to_dict(), {}, (MetricWriter,), workdir=directory
  )
