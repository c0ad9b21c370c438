"""Command that plans a training run without training.

No parameter is allocated. The text is read if the vocabulary depends on it.
"""

import sys

from absl import flags

from nanomoe.config import help as help_lib
from nanomoe.config import overrides as config_lib
from nanomoe.run import cli, terminal
from trainers.errors import UserError
from trainers.files import to_json

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.plan --config=configs/gpu_1b.py --device=h200

Prints what a training step needs: parameters, FLOPs, memory of each device by
term, traffic between devices, the largest batch that fits, and the time of the
run. Nothing is trained.
"""
_FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Python file with get_config(), as in training. --config.KEY=VALUE sets a '
  'key.',
  required=True,
  flag_values=_FLAGS,
)
_VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size',
  None,
  'Number of tokens in the vocabulary. Default: the size that the tokenizer '
  'has or requests, or that of the text.',
  lower_bound=1,
  flag_values=_FLAGS,
)
_DEVICES = flags.DEFINE_integer(
  'devices',
  0,
  'Number of devices, which a mesh axis of -1 uses; 0 means as many as the '
  'mesh has.',
  lower_bound=0,
  flag_values=_FLAGS,
)
_DEVICE = flags.DEFINE_string(
  'device',
  None,
  'Name of the device, a100, h100 or h200, for --memory and --peak_flops.',
  flag_values=_FLAGS,
)
_MEMORY = flags.DEFINE_string(
  'memory',
  None,
  'Memory of a device, such as 80GB; plans the largest batch.',
  flag_values=_FLAGS,
)
_PEAK_FLOPS = flags.DEFINE_float(
  'peak_flops',
  None,
  'Peak of a device in FLOP/s, such as 989e12; plans the time.',
  lower_bound=1.0,
  flag_values=_FLAGS,
)
_MFU = flags.DEFINE_float(
  'mfu',
  0.4,
  'Share of the peak that the products of active experts reach, in (0, 1].',
  flag_values=_FLAGS,
)
_FORMAT = flags.DEFINE_enum(
  'format', 'text', ['text', 'json'], 'Format of the plan.', flag_values=_FLAGS
)


def _parse(argv: list[str]) -> list[config_lib.Override]:
  """Returns the overrides. Absl parses the other words."""
  argv, overrides = config_lib.split_arguments(argv)
  cli.parse_flags(argv, _FLAGS, _USAGE, lambda: help_lib.keys(None))
  if not 0 < _MFU.value <= 1:
    raise UserError(f'--mfu={_MFU.value}: it must be > 0 and <= 1')
  return overrides


def main(overrides: list[config_lib.Override]) -> int:
  """Prints the plan that the flags ask for; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  config = config_lib.apply(config_lib.load_file(_CONFIG.value), overrides)

  from nanomoe.planning import (  # noqa: PLC0415 (JAX takes seconds)
    estimate,
    hardware,
    report,
    vocabulary,
  )

  memory, peak_flops = 0, _PEAK_FLOPS.value or 0.0
  if _DEVICE.value is not None:
    if _DEVICE.value not in hardware.DEVICES:
      raise UserError(
        f'--device={_DEVICE.value}: it must be one of '
        f'{", ".join(hardware.DEVICES)}; others need --memory and --peak_flops'
      )
    device = hardware.DEVICES[_DEVICE.value]
    memory, peak_flops = device.memory, peak_flops or device.peak_flops
  if _MEMORY.value is not None:
    memory = hardware.parse_bytes(_MEMORY.value, '--memory')
  target = estimate.Target(_DEVICES.value, memory, peak_flops, _MFU.value)
  vocab_size = _VOCAB_SIZE.value or vocabulary.size(config)
  plan = estimate.make(config, vocab_size, target)
  if _FORMAT.value == 'json':
    cli.show(to_json(plan, indent=2) + '\n')
  else:
    cli.show(report.text(plan) + '\n')
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
