"""Plan as text."""

from typing import Any

from nanomoe.config import help as help_lib
from nanomoe.planning import hardware

_TERMS = {
  'weights': 'parameters, float32',
  'gradients': 'as large as the weights',
  'optimizer': "the optimizer's moments",
  'average': 'the average of the weights',
  'model_state': 'router biases, counters, recent losses',
  'batch': 'tokens and running metrics',
  'activations': 'the rest of the temporary memory',
  'logits': 'one float32 copy',
}


def text(plan: dict[str, Any]) -> str:
  """Returns the lines that `nanomoe plan` prints.

  Args:
    plan: Plan, as of `estimate.make`.
  """
  sections = [_model(plan), _memory(plan), _traffic(plan), _run(plan)]
  return '\n\n'.join(
    f'{title}\n{help_lib.columns(rows)}' for title, rows in sections if rows
  )


def _model(plan: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
  computed = plan['flops_per_token']
  active = plan['active_flops_per_token']
  return 'Model', [
    ('parameters', f'{plan["num_params"]:,}'),
    ('active parameters', f'{plan["num_active_params"]:,} for a token'),
    ('vocabulary', f'{plan["vocab_size"]:,} tokens'),
    (
      'computed FLOPs',
      f'{_count(computed)} per token: all products of forward and backward, '
      f'as traced; dispatch {plan["dispatch"]}, {plan["precision"]} products',
    ),
    (
      'active FLOPs',
      f'{_count(active)} per token: without experts that did not choose it, '
      f'padding and recomputation; {active / computed:.0%} of those computed',
    ),
  ]


def _memory(plan: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
  memory, mesh = plan['memory'], plan['mesh']
  shown = ' x '.join(f'{axis} {n}' for axis, n in mesh.items() if n > 1)
  rows = [
    (term, f'{hardware.shown(memory[term])}: {meaning}')
    for term, meaning in _TERMS.items()
  ]
  rows.append(('total', hardware.shown(memory['total'])))
  if plan['num_devices'] == 1:
    rows.append(
      (
        'CPU process',
        f'{hardware.shown(plan["peak_process_bytes"])} at most, with Python, '
        'JAX and the compiler',
      )
    )
  size = plan['batch_size'], plan['block_size']
  title = f'batch of {size[0]:,} sequences of {size[1]:,} tokens'
  return (
    f'Memory of each device, mesh {shown or "of one device"}, {title}',
    rows,
  )


def _traffic(plan: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
  rows = [
    (
      kind,
      f'{round(found["count"]):,} with {hardware.shown(found["result_bytes"])} '
      f'of results; a device receives '
      f'{hardware.shown(found["received_bytes"])}',
    )
    for kind, found in plan['collectives'].items()
  ]
  if plan['open_loops']:
    rows.append(
      (
        'more',
        f'{plan["open_loops"]} loops of unknown length, which run if loads are '
        'not balanced',
      )
    )
  return 'Collectives of a step, on each device', rows


def _run(plan: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
  rows = []
  if 'largest_batch_size' in plan:
    rows.append(
      (
        'largest batch',
        f'{plan["largest_batch_size"]:,} sequences in '
        f'{hardware.shown(plan["memory_per_device"])} per device; a sequence '
        f'needs {hardware.shown(plan["bytes_per_sequence"])} on its device',
      )
    )
  if 'step_seconds' in plan:
    seconds = plan['train_seconds']
    steps = plan['num_train_steps']
    rows += [
      (
        'step',
        f'{plan["step_seconds"]:.3g} s, {plan["tokens_per_second"]:,.0f} '
        f'tokens/s, at {plan["mfu"]:.0%} of {plan["peak_flops"] / 1e12:,.0f} '
        'TFLOP/s per device',
      ),
      ('training', f'{_duration(seconds)} for {steps:,} steps'),
    ]
  compiled = plan['compiled']
  depth = ' and '.join(map(str, compiled['depths']))
  if compiled['depths'] == [compiled['num_layers']]:
    how = f'all {depth} layers'
  else:
    how = f'{depth} of {compiled["num_layers"]} layers, extrapolated linearly'
  places = ' x '.join(map(str, compiled['mesh'].values()))
  rows.append(
    (
      'found by',
      f'compiling {how} for a mesh {places} of virtual CPU devices in '
      f'{compiled["seconds"]:.0f} s, XLA_FLAGS={compiled["xla_flags"]!r}',
    )
  )
  return 'Run', rows


def _count(number: float) -> str:
  """Returns a number with a unit, such as '1.61 G'."""
  for unit in ('', 'k', 'M', 'G', 'T'):
    if number < 999.5 or unit == 'T':
      break
    number /= 1000
  return f'{number:.3g} {unit}FLOP'


def _duration(seconds: float) -> str:
  for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:,.1f} {unit}'
  return f'{seconds:.1f} s'
