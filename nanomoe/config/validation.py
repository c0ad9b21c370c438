"""Checks of a config: every mistake is one line."""

from collections.abc import Collection, Iterator, Mapping
import math
from typing import Any

from nanomoe.config import layers
from nanomoe.config.schema import (
  FIELDS,
  INJECTED,
  OPTIMIZER_ARGUMENTS,
  SPEC_GROUPS,
  SPECS,
  Field,
  flatten,
  spec_of,
)
from trainers.spec import did_you_mean

MESH_AXES = tuple(
  name.removeprefix('mesh.') for name in FIELDS if name.startswith('mesh.')
)

# Names of other trainers, by their last part, in any section.
SYNONYMS = {
  'lr': 'optimizer.learning_rate',
  'max_lr': 'optimizer.learning_rate',
  'wd': 'optimizer.weight_decay',
  'grad_clip': 'optimizer.clip_norm',
  'max_grad_norm': 'optimizer.clip_norm',
  'gradient_clip_val': 'optimizer.clip_norm',
  'warmup': 'optimizer.schedule.warmup_steps',
  'warmup_iters': 'optimizer.schedule.warmup_steps',
  'lr_scheduler': 'optimizer.schedule.type',
  'scheduler': 'optimizer.schedule.type',
  'n_layer': 'model.num_layers',
  'n_layers': 'model.num_layers',
  'num_hidden_layers': 'model.num_layers',
  'layers': 'model.num_layers',
  'n_head': 'model.num_heads',
  'n_heads': 'model.num_heads',
  'num_attention_heads': 'model.num_heads',
  'heads': 'model.num_heads',
  'n_kv_head': 'model.num_kv_heads',
  'num_key_value_heads': 'model.num_kv_heads',
  'n_embd': 'model.d_model',
  'n_embed': 'model.d_model',
  'dim': 'model.d_model',
  'hidden_size': 'model.d_model',
  'embed_dim': 'model.d_model',
  'dropout': 'model.dropout_rate',
  'gradient_checkpointing': 'model.remat',
  'n_experts': 'moe.num_experts',
  'n_expert': 'moe.num_experts',
  'num_local_experts': 'moe.num_experts',
  'experts': 'moe.num_experts',
  'num_experts_per_tok': 'moe.top_k',
  'num_experts_per_token': 'moe.top_k',
  'k': 'moe.top_k',
  'intermediate_size': 'moe.d_ff',
  'moe_intermediate_size': 'moe.d_ff',
  'ffn_dim': 'moe.d_ff',
  'aux_loss_coef': 'moe.aux_weight',
  'router_aux_loss_coef': 'moe.aux_weight',
  'z_loss_coef': 'moe.z_weight',
  'max_iters': 'num_train_steps',
  'max_steps': 'num_train_steps',
  'steps': 'num_train_steps',
  'num_steps': 'num_train_steps',
  'train_steps': 'num_train_steps',
  'iterations': 'num_train_steps',
  'batch': 'batch_size',
  'bs': 'batch_size',
  'train_batch_size': 'batch_size',
  'gradient_accumulation_steps': 'accumulate_steps',
  'grad_accum_steps': 'accumulate_steps',
  'grad_accum': 'accumulate_steps',
  'accumulate_grad_batches': 'accumulate_steps',
  'block': 'block_size',
  'seq_len': 'block_size',
  'sequence_length': 'block_size',
  'context_length': 'block_size',
  'context': 'block_size',
  'max_seq_len': 'block_size',
  'eval_every': 'eval_interval',
  'eval_steps': 'eval_interval',
  'log_every': 'log_interval',
  'logging_steps': 'log_interval',
  'random_seed': 'seed',
  'dtype': 'precision',
  'dataset_path': 'data.path',
  'text': 'data.path',
  'file': 'data.path',
  'vocab_size': 'data.tokenizer.vocab_size',
  'save_total_limit': 'checkpoint.keep_latest',
}


def problems(config: Mapping[str, Any]) -> list[str]:
  """Returns a line for each mistake in `config`."""
  flat = dict(flatten(config))
  lines = [unknown(name) for name in flat if not known(name)]
  lines += [
    f'{name} is missing: {field.meaning}; {field.allowed}'
    for name, field in FIELDS.items()
    if name not in flat
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
    f'{spec}.{name} is not an argument to set here: {other} sets it'
    for spec, names in INJECTED.items()
    for name, other in names.items()
    if f'{spec}.{name}' in flat
  ]
  sound = dict(flat)
  for name, field in FIELDS.items():
    if name in flat and (reason := violation(field, flat[name])):
      lines.append(f'{name}={shown(flat[name])}: {reason}')
      del sound[name]
  lines += [
    f'{name}={shown(value)}: it must be a finite number (an integer of at '
    f'most {bits} bits), a text, true, false, null, or a list of these'
    for name, value in flat.items()
    if (spec := spec_of(name)) is not None
    and not _is_json(value, bits := _bits(name, flat.get(f'{spec}.type')))
  ]
  return [*lines, *_contradictions(sound)]


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
  """Yields contradictions between values that are allowed by themselves."""
  if {'batch_size', 'accumulate_steps'} <= set(values):
    batch_size = values['batch_size']
    accumulate_steps = values['accumulate_steps']
    if batch_size % accumulate_steps:
      yield f'{accumulate_steps=}: it must divide {batch_size=}'
  if {'moe.top_k', 'moe.num_experts'} <= set(values):
    top_k, num_experts = values['moe.top_k'], values['moe.num_experts']
    if top_k > num_experts:
      yield f'moe.{top_k=}: it must be at most moe.{num_experts=}'
  if {'model.d_model', 'model.num_heads'} <= set(values):
    d_model, num_heads = values['model.d_model'], values['model.num_heads']
    if d_model % num_heads:
      yield f'model.{num_heads=}: it must divide model.{d_model=}'
    elif values.get('model.position') == 'rope' and d_model // num_heads % 2:
      yield (
        "model.position='rope': it rotates pairs of features, so "
        f'model.{d_model=} over model.{num_heads=} must be even'
      )
  if {'model.num_heads', 'model.num_kv_heads'} <= set(values):
    num_heads = values['model.num_heads']
    num_kv_heads = values['model.num_kv_heads'] or num_heads
    if num_heads % num_kv_heads:
      yield f'model.{num_kv_heads=}: it must divide model.{num_heads=}'
  yield from _mesh_contradictions(values)
  yield from _stack_problem(values)
  yield from _upcycle_problems(values)
  factor = values.get('optimizer.spike_factor', 0)
  if 0 < factor <= 1:
    yield (
      f'optimizer.spike_{factor=}: it would refuse ordinary updates; it must '
      'be 0 or > 1'
    )
  # Refused losses never move the median.
  if factor and values.get('callbacks.non_finite.patience') == 0:
    yield (
      f'optimizer.spike_{factor=}: every update may be refused for ever; '
      'callbacks.non_finite.patience must be > 0'
    )
  average = values.get('eval_weights') == 'average'
  if average and values.get('optimizer.ema_decay') == 0:
    yield "eval_weights='average': it needs an optimizer.ema_decay > 0"


def _mesh_contradictions(values: Mapping[str, Any]) -> Iterator[str]:
  sizes = {axis: values.get(f'mesh.{axis}', 1) for axis in MESH_AXES}
  for axis, size in sizes.items():
    if not size:
      yield f'mesh.{axis}=0: it must be >= 1, or -1 for all devices'
  if list(sizes.values()).count(-1) > 1:
    yield (
      ' '.join(f'mesh.{axis}=-1' for axis, n in sizes.items() if n == -1)
      + ': only one axis may be -1'
    )
  router = values.get('moe.router.type')
  if sizes['expert'] != 1 and router == 'ExpertChoice':
    yield (
      f"mesh.expert={sizes['expert']}: moe.router.type='ExpertChoice' selects "
      'among the tokens of all devices; it needs mesh.expert=1'
    )
  exchange = values.get('moe.exchange', 'auto')
  if exchange != 'auto' and values.get('moe.dispatch') == 'capacity':
    yield (
      f"moe.{exchange=}: moe.dispatch='capacity' would have a capacity on each "
      "device, which is another algorithm; it needs moe.exchange='auto'"
    )
  if exchange in ('tokens', 'all_to_all') and sizes['expert'] == 1:
    yield (
      f'moe.{exchange=}: it exchanges tokens along mesh.expert, which is 1; it '
      'needs mesh.expert > 1'
    )


def mesh_problems(
  values: Mapping[str, Any], sizes: Mapping[str, int]
) -> Iterator[str]:
  """Yields a line for each size that does not divide over a mesh.

  Args:
    values: Values by dotted key.
    sizes: Size of each axis of the mesh, without -1.
  """
  parts = math.prod(sizes[axis] for axis in ('data', 'fsdp', 'expert'))
  divisors = {
    'batch_size': (
      parts * values['accumulate_steps'],
      'mesh.data * mesh.fsdp * mesh.expert * accumulate_steps',
    ),
    'moe.num_experts': (sizes['expert'], 'mesh.expert'),
    **{
      name: (sizes['tensor'], 'mesh.tensor')
      for name in (
        'model.num_heads',
        'model.num_kv_heads',
        'moe.d_ff',
        'moe.dense_d_ff',
      )
    },
  }
  for name, (divisor, key) in divisors.items():
    if values[name] % divisor:  # num_kv_heads=0 means num_heads.
      yield (f'{name}={values[name]}: it must be a multiple of {key}={divisor}')


def _stack_problem(values: Mapping[str, Any]) -> Iterator[str]:
  """Yields a line if stacked layers do not fit the layers with experts."""
  keys = 'model.num_layers', 'moe.first_dense_layers', 'moe.every'
  if not values.get('model.scan_layers') or not {*keys} <= set(values):
    return
  num_layers, first, every = (values[key] for key in keys)
  num_unrolled, period = layers.repetition(num_layers, first, every)
  rest = (num_layers - num_unrolled) % period
  if rest:
    lower, higher = num_layers - rest, num_layers - rest + period
    fitting = [n for n in (lower, higher) if n > num_unrolled]
    yield (
      f'model.{num_layers=}: model.scan_layers=True needs a multiple of '
      f'moe.{every=} layers after moe.first_dense_layers={first}, such as '
      f'model.num_layers={" or ".join(map(str, fitting))}'
    )


def _upcycle_problems(values: Mapping[str, Any]) -> Iterator[str]:
  """Yields a line for each key of `upcycle` that could have no effect."""
  kind = values.get('upcycle.type')
  if kind and values.get('init_from') == '':
    yield (
      f'upcycle.type={shown(kind)}: experts start from a dense run; it needs '
      'an init_from, or must be empty'
    )
  if kind == '':
    for name, value in values.items():
      if spec_of(name) == 'upcycle' and name != 'upcycle.type':
        yield (
          f'{name}={shown(value)}: it is an argument of an upcycling; it needs '
          'an upcycle.type'
        )


def _unknown_to_optimizer(flat: Mapping[str, Any]) -> list[str]:
  """Returns a line for each argument that our optimizer does not take.

  A plug-in reports its own when it is built.
  """
  name = str(flat.get('optimizer.type', ''))
  if '.' in name or name not in OPTIMIZER_ARGUMENTS:
    return []
  allowed = {f'optimizer.{a}' for a in ('type', *OPTIMIZER_ARGUMENTS[name])}
  return [
    unknown(name, allowed)
    for name in flat
    if spec_of(name) == 'optimizer' and name not in allowed
  ]


def shown(value: Any) -> str:
  """Returns the repr of `value`, cut where it is long."""
  try:
    text = repr(value)
  except ValueError:  # Python writes no integer of more than 4300 digits.
    return f'an integer of {value.bit_length()} bits'
  return text if len(text) <= 80 else f'{text[:60]}... ({len(text)} characters)'


def _bits(name: str, kind: Any) -> int:
  """Returns the bits that an integer argument may have.

  Integers of JAX have 32 bits; a plug-in may take longer ones.
  """
  is_plug_in = isinstance(kind, str) and '.' in kind
  return 64 if is_plug_in or name.endswith('.seed') else 31


def _is_json(value: Any, bits: int) -> bool:
  """Returns whether config.json can hold `value`: JSON lacks NaN."""
  if type(value) is int:
    return abs(value) < 2**bits
  if isinstance(value, float):
    return math.isfinite(value)
  if isinstance(value, (list, tuple)):
    return all(_is_json(v, bits) for v in value)
  if isinstance(value, Mapping):  # In a list.
    return all(
      isinstance(k, str) and _is_json(v, bits) for k, v in value.items()
    )
  return value is None or isinstance(value, (bool, int, str))


def known(name: str) -> bool:
  """Returns whether `name` is a key, or an argument of a spec."""
  return name in FIELDS or spec_of(name) is not None


def unknown(name: str, arguments: Collection[str] = ()) -> str:
  """Returns a line on a key that does not exist.

  Args:
    name: The key.
    arguments: Keys that its spec takes.
  """
  names = [*FIELDS, *(f'{s}.type' for s in SPECS), *arguments]
  group = name.split('.')[0]
  if group in SPEC_GROUPS and name.count('.') < 2:
    section = name if '.' in name else f'{group}.NAME'
    return (
      f'config.{name} is a section; its keys are {section}.type and '
      f'{section}.ARGUMENT'
    )
  if any(other.startswith(f'{name}.') for other in names):
    inside = [n for n in names if n.startswith(f'{name}.')]
    return f'config.{name} is a section; its keys are {", ".join(inside)}'
  return f'unknown config key {name!r}.{_suggestion(name, names)}'


def _suggestion(name: str, names: list[str]) -> str:
  """Returns ' Did you mean ...?', or '' if no key is close.

  The same last part in another section wins, then a synonym of other trainers,
  then the nearest spelling.
  """
  last = name.rpartition('.')[2]
  same = [n for n in names if n.rpartition('.')[2] == last]
  found = same[0] if same else SYNONYMS.get(last.lower())
  return f' Did you mean {found!r}?' if found else did_you_mean(name, names)


def violation(field: Field, value: Any) -> str | None:
  """Returns what is wrong with `value`, or None."""
  wrong = f'it must be {field.allowed}'
  if field.kind is float and type(value) is int:
    if abs(value) > 2**1000:  # Larger than every float.
      return wrong
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
  if field.most is not None and value > field.most:
    return wrong
  below = 2**31 if field.kind is int and field.below is None else field.below
  if below is not None and value >= below:
    return f'{wrong} and < {below}' if field.below is None else wrong
  return None
