"""The composition root: where model, trainer and config meet."""

from collections.abc import Collection, Sequence
import functools
import logging
import pathlib
from typing import Any, NamedTuple

from clu.metric_writers import MetricWriter
from clu.periodic_actions import PeriodicAction
from flax import linen as nn
import jax
import numpy as np

from nanomoe import (
  board,
  causality,
  dispatchers,
  imports,
  memory,
  numerics,
  optimizers,
  provenance,
  schema,
  workdir,
)
from nanomoe import experts as experts_lib
from nanomoe.attention import Attention
from nanomoe.callbacks import AuxWeight, ExpertLoads, Records, TextSample
from nanomoe.config import Config
from nanomoe.data import text as text_lib
from nanomoe.data import tokenizers
from nanomoe.data.text import VOCABULARY
from nanomoe.data.tokenizer import Tokenizer
from nanomoe.heads import HEADS, softcap
from nanomoe.model import Block, Transformer
from nanomoe.moe import FeedForward, MoE, Sum
from nanomoe.norms import NORMS, identity
from nanomoe.positions import POSITIONS
from nanomoe.routers import ROUTERS
from nanomoe.task import LanguageModel
from trainers import callbacks, checkpoint, leaves, saved, spec
from trainers.callbacks.callback import Callbacks
from trainers.errors import UserError
from trainers.step import Spikes
from trainers.trainer import Trainer

log = logging.getLogger(__name__)

CALLBACKS = {name: getattr(callbacks, name) for name in callbacks.__all__}


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
  config = decide(config)
  corpus, tokenizer, dataset = text_lib.read(config, directory, allow_changed)
  task = build_task(config, tokenizer.vocab_size, tokenizer.token_bytes())
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
    **provenance.count_params(params, config),
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
    spikes=spikes_of(config),
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
    checkpointer=checkpoint.Checkpointer(
      directory.absolute() / 'checkpoints', config.checkpoint.keep_latest
    ),
    initial=functools.partial(_weights_of, pathlib.Path(config.init_from))
    if config.init_from
    else None,
    writers=build_writers(config, directory),
    workdir=directory,
    board=board.of(config),
    memory_hint=functools.partial(memory.hint, config),
  )
  imports.remember(imports.paths(config.to_dict()))
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
    'model: %s parameters, %s of them active for a token; %s dispatch, '
    '%s products, on %s',
    f'{facts["num_params"]:,}',
    f'{facts["num_active_params"]:,}',
    config.moe.dispatch,
    config.precision,
    ', '.join(facts['devices']),
  )
  if objection := causality.objection(config):
    log.warning('%s; no text is sampled', objection)
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
  arrays, meta = saved.read(directory / 'checkpoints', step)
  tokenizer = tokenizers.load(
    config.data.tokenizer.to_dict(), directory / VOCABULARY
  )
  task = build_task(config, tokenizer.vocab_size, tokenizer.token_bytes())
  batch = {'inputs': np.zeros((1, config.block_size), np.int32)}
  params, model_state = jax.eval_shape(task.init, jax.random.key(0), batch)
  return Restored(
    task,
    tokenizer,
    leaves.select(arrays, f'state.{config.eval_weights}', params),
    leaves.select(arrays, 'state.model_state', model_state),
    meta['step'],
    meta['identity'],
  )


def spikes_of(config: Config) -> Spikes | None:
  factor, window = config.optimizer.spike_factor, config.optimizer.spike_window
  return Spikes(factor, window) if factor else None


def decide(config: Config) -> Config:
  """A copy without 'auto': what a resumed run must find decided."""
  config = config.copy_and_resolve_references()
  config.precision = numerics.resolve_precision(config.precision)
  config.moe.dispatch = dispatchers.resolve_dispatch(config.moe.dispatch)
  return config


def _weights_of(source: pathlib.Path, params: Any, model_state: Any) -> Any:
  """The best params and model_state of the run in `source`."""
  arrays, meta = saved.read(source / 'checkpoints', 'best')
  config = workdir.read_config(source) or {}
  weights = config.get('eval_weights', 'params')  # An older run has no choice.
  log.info('starting from step %d of %s', meta['step'], source)
  try:
    return (
      leaves.select(arrays, f'state.{weights}', params),
      leaves.select(arrays, 'state.model_state', model_state),
    )
  except UserError as error:
    lines = [f'init_from={source}: its weights do not fit this model']
    raise UserError(lines + error.problems) from error


def build_task(
  config: Config,
  vocab_size: int,
  token_bytes: Sequence[bytes] | None = None,
) -> LanguageModel:
  model, moe = config.model, config.moe
  router = functools.partial(
    spec.build,
    'moe.router',
    moe.router.to_dict(),
    ROUTERS,
    num_experts=moe.num_experts,
    top_k=moe.top_k,
    balance=moe.balance,
    vocab_size=vocab_size,
  )
  if not isinstance(router(), nn.Module):
    raise UserError(
      f'moe.router.type={moe.router.type!r} made a {type(router()).__name__}; '
      'it must be a Linen module'
    )
  norm = NORMS[model.norm]
  position = POSITIONS[model.position](config.block_size)
  attention = functools.partial(
    Attention,
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    norm=norm if model.qk_norm else identity,
    position=position,
    use_bias=model.bias,
    dropout_rate=model.dropout_rate,
    precision=config.precision,
    name='attention',
  )

  def experts(num_experts: int, d_ff: int):
    return functools.partial(
      experts_lib.make,
      num_experts=num_experts,
      d_ff=d_ff,
      activation=moe.activation,
      use_bias=model.bias,
    )

  def dense(d_ff: int, name: str):
    return functools.partial(
      FeedForward,
      experts=experts(1, d_ff),
      precision=config.precision,
      name=name,
    )

  sparse = functools.partial(
    MoE,
    router=functools.partial(router, name='router'),
    experts=experts(moe.num_experts, moe.d_ff),
    dispatch=dispatchers.build(moe.dispatch, moe.to_dict()),
    precision=config.precision,
    name='moe',
  )
  if moe.num_shared:
    shared = dense(moe.num_shared * moe.d_ff, 'shared')
    sparse = functools.partial(
      Sum, chosen=sparse, shared=shared, name='feed_forward'
    )
  with_experts = layers_with_experts(config)
  blocks = [
    functools.partial(
      Block,
      norm=norm,
      attention=attention,
      feed_forward=(
        sparse if i in with_experts else dense(moe.dense_d_ff, 'feed_forward')
      ),
      dropout_rate=model.dropout_rate,
    )
    for i in range(model.num_layers)
  ]
  transformer = Transformer(
    vocab_size=vocab_size,
    d_model=model.d_model,
    dropout_rate=model.dropout_rate,
    remat=model.remat,
    position=position,
    blocks=blocks,
    norm=norm,
    head=functools.partial(
      HEADS[model.tie_embeddings],
      use_bias=model.bias,
      precision=config.precision,
    ),
    cap=functools.partial(softcap, cap=model.logit_softcap),
  )
  return LanguageModel(
    transformer,
    moe.aux_weight,
    moe.balance,
    token_bytes,
    z_weight=moe.z_weight,
    entropy_weight=moe.entropy_weight,
    bias_rate=getattr(router(), 'bias_rate', 0.0),
  )


def layers_with_experts(config: Config) -> list[int]:
  """After the first dense ones, each whose number, from 1, `every` divides."""
  first, every = config.moe.first_dense_layers, config.moe.every
  layers = range(first, config.model.num_layers)
  return [i for i in layers if (i + 1) % every == 0]


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
    *([ExpertLoads()] if layers_with_experts(config) else []),
    callbacks.Evaluation(config.eval_interval, monitor='cross_entropy'),
    *plugins,
    callbacks.Checkpoints(config.eval_interval),
    *([] if causality.objection(config) else [sample]),
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
