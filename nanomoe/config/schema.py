"""Every config key: its type, what is allowed, what it means."""

from collections.abc import Collection, Iterator, Mapping
import fnmatch
import math
from typing import Any, NamedTuple

from nanomoe.run import terminal
from trainers.spec import did_you_mean

_NOUNS = {
  bool: 'true or false',
  int: 'an integer',
  float: 'a number',
  str: 'a text',
}


class Field(NamedTuple):
  """Of a number: low <= value, above < value < below (of integers, 2**31).

  `absent` is the value of the key in runs of older versions, whose config.json
  lacks it; None if every version has the key.
  """

  kind: type
  meaning: str
  low: float | None = None
  below: float | None = None
  above: float | None = None
  choices: tuple[str, ...] = ()
  absent: Any = None

  @property
  def allowed(self) -> str:
    if self.choices:
      return f'one of {", ".join(map(repr, self.choices))}'
    noun = _NOUNS[self.kind]
    bounds = [] if self.low is None else [f'>= {self.low:.10g}']
    bounds += [] if self.above is None else [f'> {self.above:.10g}']
    bounds += [] if self.below is None else [f'< {self.below:.10g}']
    return f'{noun} {" and ".join(bounds)}'.strip()


_DISPATCHES = ('auto', 'dense', 'dropless', 'capacity', 'grouped')

FIELDS: dict[str, Field] = {
  'seed': Field(int, 'of parameters, batches and dropout', 0, 2**32),
  'num_train_steps': Field(int, 'updates', 1),
  'batch_size': Field(int, 'windows in an update', 1),
  'block_size': Field(int, 'tokens in a window', 1),
  'eval_interval': Field(int, 'steps between evaluations, checkpoints', 1),
  'eval_iters': Field(int, 'batches to evaluate on; 0: the whole split', 0),
  'eval_weights': Field(
    str,
    'that evaluations, samples and the commands use',
    choices=('params', 'average'),
  ),
  'log_interval': Field(int, 'steps between progress lines', 1),
  'confidence_weight': Field(float, "of predictions' negative entropy", 0),
  'precision': Field(
    str, 'of matrix products', choices=('auto', 'float32', 'bfloat16')
  ),
  'init_from': Field(str, "a run whose weights this one starts from; '': none"),
  'data.path': Field(str, "a UTF-8 text; '': Tiny Shakespeare"),
  'data.fallback': Field(
    str,
    "the text where Tiny Shakespeare cannot be had; '': an error",
    choices=('pydoc_data.topics', ''),
  ),
  'model.d_model': Field(int, 'width of the residual stream', 1),
  'model.num_layers': Field(int, 'blocks', 1),
  'model.num_heads': Field(int, 'of attention; a divisor of d_model', 1),
  'model.dropout_rate': Field(float, 'of every dropout', 0, 1),
  'model.remat': Field(bool, 'computes blocks twice, to keep less of them'),
  'model.norm': Field(
    str, 'of blocks and of what leaves them', choices=('LayerNorm', 'RMSNorm')
  ),
  'model.position': Field(
    str, 'how attention tells places apart', choices=('learned', 'rope')
  ),
  'model.conv_width': Field(
    int, 'last inputs that a short convolution before each layer sees', 1
  ),
  'model.max_ngram': Field(
    int, 'the most tokens that have an embedding together; 1: none do', 1
  ),
  'model.ngram_rows': Field(
    int, 'of embeddings of n-grams, for each n; more share rows', 1, 2**24
  ),
  'model.num_kv_heads': Field(
    int, 'of keys and values; a divisor of num_heads; 0: num_heads', 0
  ),
  'model.qk_norm': Field(bool, 'normalizes queries and keys, each head'),
  'model.bias': Field(bool, 'of linear layers and experts'),
  'model.zero_outputs': Field(
    bool, "starts blocks' last weights at 0: each is then the identity"
  ),
  'model.tie_embeddings': Field(
    bool, "makes logits by the tokens' embeddings, without a bias"
  ),
  'model.logit_softcap': Field(
    float, 'logits stay within, by a tanh; 0: anywhere', 0
  ),
  'moe.num_experts': Field(int, 'experts in a layer', 1),
  'moe.top_k': Field(int, 'experts for a token', 1),
  'moe.d_ff': Field(int, "width of an expert's hidden layer", 1),
  'moe.activation': Field(
    str, 'of hidden layers', choices=('gelu', 'relu2', 'swiglu')
  ),
  'moe.num_shared': Field(
    int,
    'experts that every token has, beside top_k: one so many times as wide',
    0,
  ),
  'moe.first_dense_layers': Field(int, 'layers before any experts', 0),
  'moe.every': Field(
    int, 'layers from one with experts to the next; between, dense ones', 1
  ),
  'moe.dense_d_ff': Field(int, "width of a dense layer's hidden layer", 1),
  'moe.dispatch': Field(
    str,
    'how tokens reach experts',
    choices=_DISPATCHES,
  ),
  'moe.eval_dispatch': Field(
    str,
    "dispatch of evaluation and generation; '': as in training",
    choices=('', *_DISPATCHES),
    absent='',
  ),
  'moe.capacity_factor': Field(
    float, "an expert's rows over an even load, in dispatch capacity", above=0
  ),
  'moe.balance': Field(
    str,
    'definition of the balance loss',
    choices=('switch_sum', 'all_choices', 'per_sequence'),
  ),
  'moe.aux_weight': Field(float, 'of the balance loss', 0),
  'moe.z_weight': Field(float, "of the routers' z-loss", 0),
  'moe.entropy_weight': Field(
    float, "of the routers' entropy: > 0 has them decide, < 0 explore"
  ),
  'optimizer.learning_rate': Field(float, 'at its highest', 0),
  'optimizer.weight_decay': Field(float, 'decoupled', 0),
  'optimizer.beta1': Field(float, 'of the first moment', 0, 1),
  'optimizer.beta2': Field(float, 'of the second moment', 0, 1),
  'optimizer.clip_norm': Field(float, 'of the gradient; 0: never', 0),
  'optimizer.decay_mask': Field(
    str, 'what weight decay applies to', choices=('all', 'matrices')
  ),
  'optimizer.spike_factor': Field(
    float,
    'updates whose loss is above so many medians are refused; 0: none',
    0,
  ),
  'optimizer.spike_window': Field(
    int, 'accepted updates whose losses have that median', 2
  ),
  'optimizer.ema_decay': Field(
    float, "of the parameters' average; 0: none is kept", 0, 1
  ),
  'checkpoint.keep_latest': Field(int, 'checkpoints, beside the best', 1),
  'sample.every_steps': Field(int, 'steps between samples; 0: at the end', 0),
  'sample.num_tokens': Field(int, 'generated each time; 0: none', 0),
  'sample.temperature': Field(float, 'of the sample; 0: the likeliest', 0),
}


def help_text(config: Mapping[str, Any] | None = None) -> str:
  """Every key and its meaning, and what it is in `config`."""
  rows = [(key, f'{f.meaning}; {f.allowed}') for key, f in FIELDS.items()]
  rows += [(f'{key}.type', meaning) for key, meaning in SPECS.items()]
  rows += [(f'{key}.NAME.type', text) for key, text in SPEC_GROUPS.items()]
  rows += list(ARGUMENTS.items())
  values = dict(flatten(config or {}))
  return terminal.columns(
    (key, f'{text} [{values[key]!r}]' if key in values else text)
    for key, text in rows
  )


# Sections with a `type`: their other keys are arguments of what it names.
SPECS = {
  'data.tokenizer': 'text to integers and back',
  'data.dataset': 'tokens to batches',
  'model.attention': 'how tokens attend to one another',
  'moe.router': 'which experts a token goes to',
  'optimizer': 'gradients to updates',
  'optimizer.schedule': 'learning rate over steps',
}
# The arguments that are an optimizer's own, of ours.
OPTIMIZER_ARGUMENTS = {
  'AdamW': (),
  'Lion': (),
  'Adafactor': (),
  'Muon': ('muon_beta',),
}
# Arguments of specs: base.py's callbacks have theirs, and every router of this
# package has its own. base.py states no argument of a router, because a router
# of another type may not have it.
ARGUMENTS = {
  'moe.router.route_scale': (
    "factor of the chosen experts' weights, > 0; 1.0 if it is not given"
  ),
  'callbacks.early_stopping.patience': (
    'evaluations without a new best, at which it stops; 0: never'
  ),
  'callbacks.non_finite.patience': (
    'refused updates in a row, at which it stops or goes back; 0: never'
  ),
  'callbacks.non_finite.max_rollbacks': 'times to go back before it stops',
  'callbacks.profile.num_steps': 'steps that are traced; 0: none',
  'callbacks.routing_alarm.action': (
    "on dead or crowded experts: 'warn'; 'raise' the balance loss's weight; "
    "'stop' the run"
  ),
  'callbacks.routing_alarm.dead_steps': (
    'steps without a token for an expert; and steps between two actions'
  ),
  'callbacks.routing_alarm.max_vio': (
    'limit of (largest - mean) / mean load; None: nine tenths of its worst, '
    'num_experts / top_k - 1'
  ),
  'callbacks.routing_alarm.factor': 'of the weight, each time it is raised',
  'callbacks.routing_alarm.min_weight': 'what it is raised to, at least',
  'callbacks.routing_alarm.max_weight': 'what it is not raised above',
}
# What NanoMoE hands to a spec is said once, elsewhere: with two values, half of
# a run would have the one, and half the other.
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
# Values that older versions named otherwise, by key: {old name: new name}. A
# key may be a pattern. Old names are read everywhere and written nowhere.
VALUE_ALIASES = {
  'moe.balance': {
    'documented': 'switch_sum',
    'mean': 'all_choices',
    'sequence': 'per_sequence',
  },
  'callbacks.*.type': {'StopOnNonFinite': 'RefusedUpdates'},
}
# Types of specs that older versions did not have, but whose behavior they had.
ABSENT_SPECS = {'model.attention': 'CausalSelfAttention'}
# Any number of specs, by any name.
SPEC_GROUPS = {
  'callbacks': 'what else happens while training',
  'writers': 'where metrics go, too',
}


def spec_of(key: str) -> str | None:
  """The spec that `key` is an argument (or the type) of, if it is."""
  if key in FIELDS or key in SPECS:
    return None
  section, _, _ = key.rpartition('.')
  in_group = section.count('.') == 1 and section.split('.')[0] in SPEC_GROUPS
  return section if section in SPECS or in_group else None


def current_value(key: str, value: Any) -> Any:
  """Returns `value` under its current name, if an older version named it.

  Args:
    key: Dotted key of the config.
    value: Value of the key, of any type.
  """
  for pattern, names in VALUE_ALIASES.items():
    if isinstance(value, str) and fnmatch.fnmatchcase(key, pattern):
      return names.get(value, value)
  return value


def with_current_values(
  config: Mapping[str, Any], prefix: str = ''
) -> dict[str, Any]:
  """Returns a copy of `config` with every value under its current name."""
  return {
    key: with_current_values(value, f'{prefix}{key}.')
    if isinstance(value, Mapping)
    else current_value(f'{prefix}{key}', value)
    for key, value in config.items()
  }


def upgraded(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config of an older run with current values and all keys.

  Keys that the run's version lacked get the value `absent` of their `Field`, or
  their type in `ABSENT_SPECS`.
  """
  values = with_current_values(config)
  for spec, name in ABSENT_SPECS.items():
    section, _, last = spec.rpartition('.')
    if isinstance(values.get(section), dict):
      values[section].setdefault(last, {'type': name})
  for key, field in FIELDS.items():
    *sections, name = key.split('.')
    section: Any = values
    for part in sections:
      section = section.get(part) if isinstance(section, dict) else None
    if field.absent is not None and isinstance(section, dict):
      section.setdefault(name, field.absent)
  return values


def flatten(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple]:
  """(dotted key, value) of every leaf."""
  for key, value in config.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', value


def problems(config: Mapping[str, Any]) -> list[str]:
  """Everything that is wrong with `config`, a line each."""
  flat = dict(flatten(config))
  lines = [unknown(key) for key in flat if not known(key)]
  lines += [
    f'{key} is missing: {field.meaning}; {field.allowed}'
    for key, field in FIELDS.items()
    if key not in flat
  ]
  specs = {*SPECS, *(s for k in flat if (s := spec_of(k)) is not None)}
  lines += [
    f'{spec}.type is missing: the name of a class, or its import path.'
    + did_you_mean(spec, specs - {spec})
    for spec in sorted(specs)
    if not isinstance(flat.get(f'{spec}.type'), str)
  ]
  lines += _unknown_to_optimizer(flat)
  lines += [
    f'config.{spec}.{key} is no argument of its own: {other} says it'
    for spec, keys in INJECTED.items()
    for key, other in keys.items()
    if f'{spec}.{key}' in flat
  ]
  sound = dict(flat)
  for key, field in FIELDS.items():
    if key in flat and (reason := _violation(field, flat[key])):
      lines.append(f'{key}={shown(flat[key])}: {reason}')
      del sound[key]
  lines += [
    f'{key}={shown(value)}: it must be a finite number, a text, true, false, '
    'null, or a list of these'
    for key, value in flat.items()
    if spec_of(key) is not None and not _is_json(value)
  ]
  return [*lines, *_contradictions(sound)]


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
  """Between `values`, each allowed by itself; some may be missing."""
  if {'moe.top_k', 'moe.num_experts'} <= set(values):
    top_k, num_experts = values['moe.top_k'], values['moe.num_experts']
    if top_k > num_experts:
      yield f'moe.top_k={top_k} is more than moe.{num_experts=}'
  if {'model.d_model', 'model.num_heads'} <= set(values):
    d_model, num_heads = values['model.d_model'], values['model.num_heads']
    if d_model % num_heads:
      yield f'model.{num_heads=} does not divide model.{d_model=}'
    elif values.get('model.position') == 'rope' and d_model // num_heads % 2:
      yield (
        f"model.position='rope' turns pairs: model.{d_model=} over "
        f'model.{num_heads=} must be even'
      )
  if {'model.num_heads', 'model.num_kv_heads'} <= set(values):
    num_heads = values['model.num_heads']
    num_kv_heads = values['model.num_kv_heads'] or num_heads
    if num_heads % num_kv_heads:
      yield f'model.{num_kv_heads=} does not divide model.{num_heads=}'
  factor = values.get('optimizer.spike_factor', 0)
  if 0 < factor <= 1:
    yield (
      f'optimizer.spike_{factor=} would refuse ordinary updates: it must be 0 '
      'or > 1'
    )
  # Refused losses never move the median.
  if factor and values.get('callbacks.non_finite.patience') == 0:
    yield (
      f'optimizer.spike_{factor=} may refuse every update, for ever: '
      'callbacks.non_finite.patience must be > 0'
    )
  average = values.get('eval_weights') == 'average'
  if average and values.get('optimizer.ema_decay') == 0:
    yield "eval_weights='average' needs an optimizer.ema_decay above 0"


def _unknown_to_optimizer(flat: Mapping[str, Any]) -> list[str]:
  """Told here, with all other mistakes: a plug-in tells it when it is built."""
  name = str(flat.get('optimizer.type', ''))
  if '.' in name or name not in OPTIMIZER_ARGUMENTS:
    return []
  allowed = {f'optimizer.{a}' for a in ('type', *OPTIMIZER_ARGUMENTS[name])}
  return [
    unknown(key, allowed)
    for key in flat
    if spec_of(key) == 'optimizer' and key not in allowed
  ]


def shown(value: Any) -> str:
  """Its repr, cut where it is long."""
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'


def _is_json(value: Any) -> bool:
  """Whether config.json can hold it: JSON has no nan and no infinity."""
  if isinstance(value, float):
    return math.isfinite(value)
  if isinstance(value, (list, tuple)):
    return all(map(_is_json, value))
  if isinstance(value, Mapping):  # In a list.
    return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
  return value is None or isinstance(value, (bool, int, str))


def known(key: str) -> bool:
  return key in FIELDS or spec_of(key) is not None


def unknown(key: str, arguments: Collection[str] = ()) -> str:
  """What to say of a key that is none, nor one of a spec's `arguments`."""
  names = [*FIELDS, *(f'{s}.type' for s in SPECS), *arguments]
  group = key.split('.')[0]
  if group in SPEC_GROUPS and key.count('.') < 2:
    name = key if '.' in key else f'{group}.NAME'
    return (
      f'config.{key} is a section; its keys are {name}.type and {name}.ARGUMENT'
    )
  if any(name.startswith(f'{key}.') for name in names):
    inside = [n for n in names if n.startswith(f'{key}.')]
    return f'config.{key} is a section; its keys are {", ".join(inside)}'
  last = key.rpartition('.')[2]
  same = [n for n in names if n.rpartition('.')[2] == last]
  hint = f' Did you mean {same[0]!r}?' if same else did_you_mean(key, names)
  return f'config.{key} is no key of the config.{hint}'


def _violation(field: Field, value: Any) -> str | None:
  """What is wrong with `value`, or None."""
  wrong = f'it must be {field.allowed}'
  if field.kind is float and type(value) is int:
    if abs(value) > 2**1000:
      return wrong  # No float is as large.
    value = float(value)
  if type(value) is not field.kind:
    return wrong
  if field.choices and value not in field.choices:
    return wrong + did_you_mean(str(value), field.choices)
  if field.kind in (bool, str):
    return None
  if isinstance(value, float) and not math.isfinite(value):
    return wrong
  if field.low is not None and value < field.low:
    return wrong
  if field.above is not None and value <= field.above:
    return wrong
  below = 2**31 if field.kind is int and field.below is None else field.below
  if below is not None and value >= below:
    return f'{wrong} and < {below}' if field.below is None else wrong
  return None
