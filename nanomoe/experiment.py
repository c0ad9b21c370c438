"""Composition root: builds the trainer and the model of a config."""

from collections.abc import Callable, Collection
import functools
import hashlib
import json
import logging
import pathlib
from typing import Any, NamedTuple

from clu.metric_writers import MetricWriter
from clu.periodic_actions import PeriodicAction
import jax
from jax.sharding import Mesh
import numpy as np

from nanomoe import optimizers
from nanomoe.callbacks import (
  AuxWeight,
  Records,
  RoutingAlarm,
  TextSample,
  pictures,
)
from nanomoe.config import schema, validation
from nanomoe.config.schema import Config
from nanomoe.data import pipeline as text_lib
from nanomoe.data import tokenizers
from nanomoe.data.pipeline import VOCABULARY
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.model import checkpoints, parameters, upcycling
from nanomoe.model.build import (
  generation_problem,
  layers_with_experts,
  resolve_auto,
)
from nanomoe.moe.dispatch import exchange, registry
from nanomoe.ops.activations import ACTIVATIONS
from nanomoe.run import (
  charts,
  jax_settings,
  memory_hint,
  peers,
  provenance,
  trusted_imports,
  workdir,
)
from nanomoe.task import LanguageModel, build_task
from trainers import callbacks, spec
from trainers.callbacks.group import Callbacks
from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import checkpointer, reader
from trainers.errors import UserError
from trainers.mesh import Placement, make_mesh, num_batch_parts
from trainers.runtime import keys, processes
from trainers.step import Spikes
from trainers.trainer import Trainer
from trainers.writers.csv_table import Csv
from trainers.writers.mlflow_run import MLflow
from trainers.writers.wandb_run import Wandb

log = logging.getLogger(__name__)

CALLBACKS = {
  **{name: getattr(callbacks, name) for name in callbacks.__all__},
  'RoutingAlarm': RoutingAlarm,
}
WRITERS = {'Csv': Csv, 'MLflow': MLflow, 'Wandb': Wandb}
# Largest number of tokens whose experts are counted; a picture has one column
# per token.
MAX_WATCHED = 128


def build(
  config: Config,
  directory: pathlib.Path,
  allow_changed: Collection[str] = (),
  initial: Callable[[Any, Any], Any] | None = None,
) -> Trainer:
  """Returns the trainer that `config` describes; `.fit()` runs it.

  Writes config.json, with 'auto' resolved, and vocabulary.json. A resumed run
  writes them after its checkpoint was found to fit.

  Args:
    config: Config with every key.
    directory: Directory of the run.
    allow_changed: Names in `resume.ALLOWABLE` that may differ from the
      checkpoint.
    initial: Returns the params and the model_state of step 0, given their
      shapes; None for those of `config.init_from`, or random ones.

  Raises:
    UserError: A line for each mistake in the config, the data or the directory.
  """
  if lines := validation.problems(config.to_dict()):
    raise UserError(lines)
  jax_settings.pin()
  peers.check_equal(
    {
      'allow_changed': sorted(allow_changed),
      'versions': provenance.versions(),
      **dict(schema.flatten(config.to_dict())),
    }
  )
  config = _resolved(config)
  mesh = make_mesh(config.mesh.to_dict())
  flat = dict(schema.flatten(config.to_dict()))
  if lines := [*validation.mesh_problems(flat, mesh.shape)]:
    raise UserError(lines)
  corpus, tokenizer, dataset = text_lib.read(config, directory, allow_changed)
  peers.check_equal(
    {
      'corpus_sha256': corpus.fingerprint,
      'data': dataset.fingerprint,
      'vocabulary_sha256': _sha256(tokenizer.state_dict()),
    }
  )
  token_bytes = tokenizer.token_bytes()
  watched = text_lib.frequent(dataset, token_bytes, MAX_WATCHED)
  task = build_task(config, tokenizer.vocab_size, token_bytes, watched, mesh)
  optimizer, schedule = optimizers.build(
    config.optimizer, config.num_train_steps
  )
  # A resumed run has weights of its own, and may have lost its source.
  if config.upcycle.type and workdir.read_config(directory) is None:
    source = workdir.config_of(pathlib.Path(config.init_from))
    upcycling.check(source, config, tokenizer.vocab_size)
  batch = dataset.train_batch(0, slice(0, config.batch_size))
  params, _ = jax.eval_shape(task.init, keys.make(0), batch)
  facts = {
    'corpus': corpus.name,
    'corpus_sha256': corpus.fingerprint,
    'num_characters': len(corpus.text),
    'vocab_size': tokenizer.vocab_size,
    'dispatch': config.moe.dispatch,
    'eval_dispatch': registry.eval_dispatch(config.moe),
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
    accumulate_steps=config.accumulate_steps,
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
      directory.absolute() / 'checkpoints',
      config.checkpoint.keep_latest,
      checkpoints.layout(config),
    ),
    initial=initial
    or (
      functools.partial(
        _initial_weights, config, vocab_size=tokenizer.vocab_size
      )
      if config.init_from
      else None
    ),
    writers=build_writers(config, directory)
    if processes.group('writers').is_first
    else [],
    workdir=directory,
    board=charts.of(config),
    memory_hint=functools.partial(memory_hint.hint, config),
    placement=Placement(mesh, parameters.axes),
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
  if name := _exchange(config, mesh):
    log.info('exchange between devices: %s', name)
  if problem := generation_problem(config):
    log.warning('%s; no text is sampled', problem)
  return trainer


class Restored(NamedTuple):
  """Trained model with the weights that its run evaluates.

  Attributes:
    task: Language model.
    tokenizer: Tokenizer of the run.
    params, model_state: Weights, and state without gradients.
    step: Step of the checkpoint.
    identity: Facts about the run: data, seed and batch size.
  """

  task: LanguageModel
  tokenizer: Tokenizer
  params: Any
  model_state: Any
  step: int
  identity: dict[str, Any]


def restore(config: Config, directory: pathlib.Path, step: str) -> Restored:
  """Returns the model in a checkpoint.

  Args:
    config: Config of the run.
    directory: Directory of the run.
    step: Step of the checkpoint: a number, 'best' or 'latest'.

  Raises:
    UserError: There is no such checkpoint, or the vocabulary is damaged.
  """
  jax_settings.pin()
  layout = checkpoints.layout(config)
  names = (f'state.{config.eval_weights}.', 'state.model_state.')
  arrays, meta = reader.read(directory / 'checkpoints', step, layout, names)
  tokenizer = tokenizers.load(
    config.data.tokenizer.to_dict(), directory / VOCABULARY
  )
  task = build_task(config, tokenizer.vocab_size, tokenizer.token_bytes())
  batch = {'inputs': np.zeros((1, config.block_size), np.int32)}
  params, model_state = jax.eval_shape(task.init, keys.make(0), batch)
  return Restored(
    task,
    tokenizer,
    arrays_lib.subtree(arrays, f'state.{config.eval_weights}', params),
    arrays_lib.subtree(arrays, 'state.model_state', model_state),
    meta['step'],
    meta['identity'],
  )


def _sha256(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _resolved(config: Config) -> Config:
  """Returns `config` with 'auto' resolved by process 0, for all processes."""
  group = processes.group('auto')
  values = group.first(
    lambda: dict(schema.flatten(resolve_auto(config).to_dict()))
  )
  config = config.copy_and_resolve_references()
  for key in ('precision', 'moe.dispatch', 'moe.eval_dispatch'):
    config.update_from_flattened_dict({key: values[key]})
  return config


def _exchange(config: Config, mesh: Mesh) -> str:
  """Returns the exchange of a training step, or '' if there is none."""
  moe, parts = config.moe, num_batch_parts(mesh)
  is_local = registry.DISPATCH[moe.dispatch].is_local
  if parts == 1 or not is_local or not layers_with_experts(config):
    return ''
  if moe.exchange != 'auto':
    return moe.exchange
  matrices = 3 if ACTIVATIONS[moe.activation].gated else 2
  return exchange.choose(
    mesh.shape,
    num_tokens=config.batch_size * config.block_size // parts,
    top_k=moe.top_k,
    d_model=config.model.d_model,
    num_weights=matrices * moe.num_experts * config.model.d_model * moe.d_ff,
  )


def _initial_weights(
  config: Config, params: Any, model_state: Any, *, vocab_size: int
) -> Any:
  """Returns the best params and model_state of the run `config.init_from`.

  Args:
    config: Config of the new run.
    params: Shapes of the new run's parameters.
    model_state: Shapes of its state without gradients.
    vocab_size: Number of tokens, which the routers of an upcycling need.

  Raises:
    UserError: There is no such run, or its weights do not fit.
  """
  source = pathlib.Path(config.init_from)
  other = workdir.config_of(source)
  # Another attention has other parameters, and may not be imported.
  has_same = other.model.attention.type == config.model.attention.type
  layout = checkpoints.layout(other) if has_same else None
  weights = other.eval_weights
  names = (f'state.{weights}.', 'state.model_state.')
  arrays, meta = reader.read(source / 'checkpoints', 'best', layout, names)
  log.info('starting from step %d of %s', meta['step'], source)
  if config.upcycle.type:
    upcycling.check(other, config, vocab_size)
    task = build_task(upcycling.unrolled(config), vocab_size)
    arrays = upcycling.upcycle(arrays, weights, config, task.init, vocab_size)
  try:
    return (
      arrays_lib.subtree(arrays, f'state.{weights}', params),
      arrays_lib.subtree(arrays, 'state.model_state', model_state),
    )
  except UserError as error:
    lines = [f'init_from={source}: the weights do not fit this model']
    raise UserError(lines + error.problems) from error


def build_callbacks(
  config: Config,
  directory: pathlib.Path,
  task: LanguageModel,
  tokenizer: Tokenizer,
  prompt: str,
  facts: dict[str, Any],
) -> list[callbacks.Callback]:
  """Returns the callbacks in the order of their calls."""
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
      # train_loss includes the balance loss and other penalties.
      train_metrics={'train_cross_entropy': 'cross_entropy'},
    ),
  ]


def build_writers(
  config: Config, directory: pathlib.Path
) -> list[MetricWriter]:
  """Returns the metric writers that the config adds."""
  return spec.build_group(
    'writers',
    config.writers.to_dict(),
    WRITERS,
    (MetricWriter,),
    workdir=directory,
  )
