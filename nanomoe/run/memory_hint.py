"""Suggestions for a config whose step needs too much memory."""

from nanomoe.config.schema import Config
from trainers.runtime.memory import StepMemory


def hint(config: Config, memory: StepMemory) -> str:
  """Returns config keys that reduce the largest share of the memory.

  Args:
    config: Config of the run.
    memory: Memory of a compiled step.
  """
  if memory.temporaries < memory.state:
    return (
      'the model needs most of the memory, so lower --config.model.d_model, '
      '--config.moe.d_ff or --config.moe.num_experts'
    )
  halved, needed = config.batch_size // 2, memory.temporaries / 2
  while halved > 1 and memory.free is not None and needed > memory.free:
    halved, needed = halved // 2, needed / 2
  options = []
  if config.model.remat != 'block':
    options.append('--config.model.remat=block')
  if config.precision == 'float32':
    options.append('--config.precision=bfloat16')
  if halved:
    options.append(f'--config.batch_size={halved}')
  else:
    options.append('a lower --config.block_size')
  return f'activations need most of the memory, so try {", or ".join(options)}'
