"""What to change in a config whose step needs too much memory."""

from nanomoe.config.schema import Config
from trainers.runtime.memory import StepMemory


def hint(config: Config, memory: StepMemory) -> str:
  """The keys that would help, judged by what takes the memory."""
  if memory.temporaries < memory.state:
    return (
      'the model is most of it: lower --config.model.d_model, '
      '--config.moe.d_ff or --config.moe.num_experts'
    )
  halved, needed = config.batch_size // 2, memory.temporaries / 2
  while halved > 1 and memory.free is not None and needed > memory.free:
    halved, needed = halved // 2, needed / 2
  ways = []
  if not config.model.remat:
    ways.append('--config.model.remat=true')
  if config.precision == 'float32':
    ways.append('--config.precision=bfloat16')
  if halved:
    ways.append(f'--config.batch_size={halved}')
  else:
    ways.append('a lower --config.block_size')
  return f'activations are most of it: try {", or ".join(ways)}'
