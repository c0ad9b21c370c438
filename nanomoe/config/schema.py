"""Every config key: its type, its range, its meaning and its resume policy.

`Config` and its sections are the typed view of a config: editors and type
checkers read them, and `FIELDS` is derived from them. `configs/base.py` holds
the defaults.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ml_collections import ConfigDict

from nanomoe.config.fields import (
  Field,
  Resume,
  Section,
  Spec,
  SpecField,
  key,
  spec,
)

_FREE = Resume.FREE
_BY_NAME = Resume.BY_NAME


class Data(Section):
  """Section of the training text, its tokenizer and its dataset."""

  path: str = key(
    'Path of a UTF-8 text; empty selects Tiny Shakespeare', resume=_FREE
  )  # The text itself is recorded by its SHA-256, and may not change.
  fallback: str = key(
    'Text to train on if Tiny Shakespeare cannot be found; empty is an error',
    choices=('pydoc_data.topics', ''),
    resume=_FREE,
  )
  tokenizer: Spec = spec('Tokenizer', allow='tokenizer')
  dataset: Spec = spec('Dataset: how tokens become batches', allow='data')


class Model(Section):
  """Section of the transformer."""

  d_model: int = key('Width of the residual stream', 1)
  vocab_rows: int = key(
    'Rows of the embedding and the output layer; 0 means one for each token',
    0,
    absent=0,
  )
  num_layers: int = key('Number of blocks', 1)
  num_heads: int = key('Number of attention heads; must divide d_model', 1)
  dropout_rate: float = key('Rate of every dropout; 0 disables it', 0, 1)
  scan_layers: bool = key(
    'Blocks as one loop over stacked parameters, which is compiled once for '
    'all depths',
    absent=False,
  )
  logits_chunk: int = key(
    'Tokens of each sequence whose logits exist at a time in the loss, which '
    'saves memory; 0 means all',
    0,
    resume=_FREE,
    absent=0,
  )
  remat: str = key(
    'Part of each block that the backward pass computes again, which saves '
    'memory',
    choices=('none', 'attention', 'block'),
    resume=_FREE,
    renamed={'false': 'none', 'true': 'block'},
  )
  norm: str = key(
    'Normalization of blocks and of the output',
    choices=('LayerNorm', 'RMSNorm'),
  )
  attention: Spec = spec(
    'Attention: how tokens attend to each other',
    absent='CausalSelfAttention',
  )
  position: str = key('Position encoding', choices=('learned', 'rope'))
  conv_width: int = key(
    'Width of a causal convolution before each layer; 1 disables it', 1
  )
  max_ngram: int = key(
    'Longest n-gram with an embedding of its own; 1 disables n-grams', 1
  )
  ngram_rows: int = key(
    'Rows of the embedding table of each n; more n-grams share rows', 1, 2**24
  )
  num_kv_heads: int = key(
    'Number of key and value heads; must divide num_heads; 0 means num_heads',
    0,
  )
  qk_norm: bool = key('Normalization of queries and keys in each head')
  bias: bool = key('Biases in linear layers and experts')
  zero_outputs: bool = key(
    'Zero initialization of the last weights of each branch of a block'
  )
  tie_embeddings: bool = key(
    'Output layer with the token embeddings as weights, without a bias'
  )
  logit_softcap: float = key(
    'Bound on the magnitude of logits, by a tanh; 0 disables it', 0
  )


_DISPATCHES = ('auto', 'dense', 'dropless', 'capacity', 'grouped')


class MoE(Section):
  """Section of the experts, their router and their dispatch."""

  num_experts: int = key('Number of experts in a layer', 1)
  top_k: int = key('Number of experts per token', 1)
  d_ff: int = key('Width of the hidden layer of an expert', 1)
  activation: str = key(
    'Activation of hidden layers', choices=('gelu', 'relu2', 'swiglu')
  )
  num_shared: int = key(
    'Number of shared experts, which every token uses; they form one wide '
    'expert',
    0,
  )
  first_dense_layers: int = key('Number of dense layers before the experts', 0)
  every: int = key(
    'Distance in layers between layers with experts; the others are dense', 1
  )
  dense_d_ff: int = key('Width of the hidden layer of a dense layer', 1)
  router: Spec = spec('Router: which experts process a token')
  dispatch: str = key(
    'Algorithm that moves tokens to experts', choices=_DISPATCHES
  )
  eval_dispatch: str = key(
    'Dispatch of evaluation and generation; empty means as in training',
    choices=('', *_DISPATCHES),
    resume=_BY_NAME,
    absent='',
  )
  exchange: str = key(
    'Exchange between devices of tokens or experts; auto moves the fewest '
    'bytes',
    choices=('auto', 'experts', 'tokens', 'all_to_all'),
    resume=_FREE,
    absent='auto',
  )
  capacity_factor: float = key(
    'Capacity of an expert over its balanced load, in dispatch capacity',
    above=0,
  )
  balance: str = key(
    'Definition of the load-balancing loss',
    choices=('switch_sum', 'all_choices', 'per_sequence'),
    renamed={
      'documented': 'switch_sum',
      'mean': 'all_choices',
      'sequence': 'per_sequence',
    },
  )
  aux_weight: float = key(
    'Weight of the load-balancing loss; 0 disables it', 0, resume=_BY_NAME
  )
  z_weight: float = key(
    'Weight of the router z-loss; 0 disables it', 0, resume=_BY_NAME
  )
  entropy_weight: float = key(
    'Weight of the router entropy; > 0 sharpens routing, < 0 flattens it',
    resume=_BY_NAME,
  )


class Optimizer(Section):
  """Section of the optimizer, its schedule and the average of parameters."""

  type: str = spec('Optimizer: how gradients become updates')
  learning_rate: float = key('Peak learning rate', 0, resume=_BY_NAME)
  weight_decay: float = key(
    'Decoupled weight decay; 0 disables it', 0, resume=_BY_NAME
  )
  beta1: float = key('Decay of the first moment', 0, 1, resume=_BY_NAME)
  beta2: float = key('Decay of the second moment', 0, 1, resume=_BY_NAME)
  schedule: Spec = spec(
    'Schedule of the learning rate over steps; with a warm-up, the first '
    'update has learning rate 0',
    resume=_BY_NAME,
  )
  clip_norm: float = key(
    'Largest norm of the gradient; 0 disables clipping', 0, resume=_BY_NAME
  )
  decay_mask: str = key(
    'Parameters that weight decay applies to',
    choices=('all', 'matrices'),
    resume=_BY_NAME,
  )
  spike_factor: float = key(
    'Largest loss of an accepted update, over the median of recent losses; '
    '0 disables it',
    0,
    resume=_BY_NAME,
  )
  spike_window: int = key(
    'Number of accepted updates whose losses form that median', 2
  )
  ema_decay: float = key(
    'Decay of the running average of parameters; 0 keeps no average', 0, 1
  )


class Mesh(Section):
  """Section of the mesh of devices. One of its axes may be -1."""

  data: int = key(
    'Copies of the parameters, each with a part of the batch; -1 uses all '
    'devices',
    -1,
    resume=_FREE,
    absent=1,
  )
  fsdp: int = key(
    'Parts of the batch and of all parameters, which are gathered where they '
    'are used',
    -1,
    resume=_FREE,
    absent=1,
  )
  expert: int = key(
    'Parts of the batch and of the experts; tokens travel to their experts',
    -1,
    resume=_FREE,
    absent=1,
  )
  tensor: int = key(
    'Parts of matrices, of which each device computes its own products',
    -1,
    resume=_FREE,
    absent=1,
  )


class Checkpoint(Section):
  """Section of checkpoints."""

  keep_latest: int = key(
    'Number of newest checkpoints to keep, beside the best', 1, resume=_FREE
  )


class Sample(Section):
  """Section of text samples during training."""

  every_steps: int = key(
    'Steps between samples; 0 samples at the end only', 0, resume=_FREE
  )
  num_tokens: int = key(
    'Number of tokens in a sample; 0 disables samples', 0, resume=_FREE
  )
  temperature: float = key(
    'Sampling temperature; 0 takes the most likely token', 0, resume=_FREE
  )


class Keys(Section):
  """Typed view of a whole config."""

  seed: int = key(
    'Random seed of parameters, batches and dropout', 0, 2**32, allow='seed'
  )
  num_train_steps: int = key('Number of training steps', 1, resume=_BY_NAME)
  batch_size: int = key('Sequences in a batch', 1, allow='batch_size')
  accumulate_steps: int = key(
    'Micro-batches that a batch is computed in, which saves memory; must '
    'divide batch_size',
    1,
    resume=_BY_NAME,  # Sums of micro-batches differ in their last bits.
    absent=1,
  )
  block_size: int = key('Tokens in a sequence', 1)
  eval_interval: int = key(
    'Steps between evaluations, and between checkpoints', 1, resume=_FREE
  )
  eval_iters: int = key(
    'Batches of an evaluation; 0 means the whole split', 0, resume=_FREE
  )
  eval_weights: str = key(
    'Weights that evaluation, sampling and the commands use',
    choices=('params', 'average'),
    resume=_BY_NAME,
  )
  log_interval: int = key('Steps between progress lines', 1, resume=_FREE)
  confidence_weight: float = key(
    'Weight of the penalty on confident predictions; 0 disables it',
    0,
    resume=_BY_NAME,
  )
  precision: str = key(
    'Precision of matrix products', choices=('auto', 'float32', 'bfloat16')
  )
  init_from: str = key(
    'Directory of a run whose best weights this run starts from; empty for none'
  )
  upcycle: Spec = spec(
    'Upcycling: how experts start from the dense layers of init_from; empty '
    'for none',
    absent='',
  )
  data: Data
  model: Model
  moe: MoE
  optimizer: Optimizer
  mesh: Mesh
  checkpoint: Checkpoint
  sample: Sample
  callbacks: ConfigDict
  writers: ConfigDict


if TYPE_CHECKING:
  Config = Keys
else:
  Config = ConfigDict


def make(values: Mapping[str, Any]) -> Config:
  """Returns a config that holds `values`."""
  return cast(Config, ConfigDict(values))


def _walk(section: type, prefix: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, Field or SpecField) in the order of definition."""
  for name, kind in section.__annotations__.items():
    declared = vars(section).get(name)
    if isinstance(declared, SpecField):
      own = prefix.rstrip('.') if name == 'type' else f'{prefix}{name}'
      yield own, declared
    elif isinstance(declared, Field):
      yield f'{prefix}{name}', declared._replace(kind=kind)
    elif kind is not ConfigDict:
      yield from _walk(kind, f'{prefix}{name}.')


FIELDS: dict[str, Field] = {
  k: f for k, f in _walk(Keys) if isinstance(f, Field)
}
# Sections with a `type`. Their other keys are arguments of what it names.
SPECS: dict[str, SpecField] = {
  k: f for k, f in _walk(Keys) if isinstance(f, SpecField)
}
# Sections that hold any number of specs, under any name.
SPEC_GROUPS: dict[str, SpecField] = {
  'callbacks': SpecField(
    'Callback of that name',
    Resume.FREE,
    renamed={'StopOnNonFinite': 'RefusedUpdates'},
  ),
  'writers': SpecField('Metric writer of that name', Resume.FREE),
}

# Arguments of our optimizers that are not keys of every optimizer.
OPTIMIZER_ARGUMENTS = {
  'AdamW': (),
  'Lion': (),
  'Adafactor': (),
  'Muon': ('muon_beta',),
}
# Arguments of specs, for --help.
ARGUMENTS = {
  'moe.router.route_scale': (
    'Factor of the weights of the selected experts, > 0; 1.0 by default'
  ),
  'upcycle.ratio': (
    'Share of the hidden units of each expert that type Drop redraws, from 0 '
    'to 1; 0.5 by default'
  ),
  'callbacks.early_stopping.patience': (
    'Evaluations without a new best after which the run stops; 0 disables it'
  ),
  'callbacks.non_finite.patience': (
    'Refused updates in a row after which the run rolls back or stops; 0 '
    'disables it'
  ),
  'callbacks.non_finite.max_rollbacks': (
    'Number of rollbacks before the run stops as diverged'
  ),
  'callbacks.profile.num_steps': 'Number of steps to trace; 0 disables it',
  'callbacks.routing_alarm.action': (
    "Action on dead or overloaded experts: 'warn', 'raise' the weight of the "
    "load-balancing loss, or 'stop' the run"
  ),
  'callbacks.routing_alarm.dead_steps': (
    'Steps without a token after which an expert is dead; also the steps '
    'between two actions'
  ),
  'callbacks.routing_alarm.max_vio': (
    'Limit of (largest - mean) / mean load; None means 0.9 * (num_experts / '
    'top_k - 1)'
  ),
  'callbacks.routing_alarm.factor': 'Factor of each increase of the weight',
  'callbacks.routing_alarm.min_weight': 'Smallest weight after an increase',
  'callbacks.routing_alarm.max_weight': 'Largest weight after an increase',
}
# Arguments that NanoMoE injects, and the key that states each. A second value
# in the spec would contradict that key.
INJECTED = {
  'model.attention': {
    'num_heads': 'model.num_heads',
    'num_kv_heads': 'model.num_kv_heads',
    'norm': 'model.qk_norm',
    'position': 'model.position',
    'use_bias': 'model.bias',
    'dropout_rate': 'model.dropout_rate',
    'precision': 'precision',
    'out_init': 'model.zero_outputs',
  },
  'moe.router': {
    'num_experts': 'moe.num_experts',
    'top_k': 'moe.top_k',
    'balance': 'moe.balance',
    'vocab_size': 'data.tokenizer',
  },
  'data.dataset': {
    'splits': 'data.path',
    'seed': 'seed',
    'batch_size': 'batch_size',
    'block_size': 'block_size',
    'eval_iters': 'eval_iters',
  },
}


def spec_of(name: str) -> str | None:
  """Returns the spec that the key `name` is an argument or the type of."""
  if name in FIELDS or name in SPECS:
    return None
  section, _, _ = name.rpartition('.')
  in_group = section.count('.') == 1 and section.split('.')[0] in SPEC_GROUPS
  return section if section in SPECS or in_group else None


def policy(name: str) -> Field | SpecField | None:
  """Returns what declares the key `name`: its field, its spec or its group."""
  if name in FIELDS:
    return FIELDS[name]
  section = spec_of(name) or ''
  return SPECS.get(section) or SPEC_GROUPS.get(section.split('.')[0])


def flatten(
  config: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, value) of every leaf."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', value
