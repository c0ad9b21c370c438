"""Command that exports a run to transformers or llama.cpp, and verifies it."""

import importlib.util
import pathlib
import shutil
import sys
from typing import Any

from absl import flags

from nanomoe.config import home
from nanomoe.run import backend, cli, terminal
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError
from trainers.files import to_json

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.export --workdir=DIR --out=DIR2

Writes a checkpoint for AutoModelForCausalLM and AutoTokenizer of transformers,
or with --format=gguf for llama.cpp, and compares the files with the checkpoint.
A failed comparison leaves nothing.
"""
_FLAGS = flags.FlagValues()
_WORKDIR = cli.define_workdir(_FLAGS)
_OUT = flags.DEFINE_string(
  'out',
  None,
  'Directory of the export, which must not exist.',
  required=True,
  flag_values=_FLAGS,
)
_STEP = cli.define_step(_FLAGS)
_FORMAT = flags.DEFINE_enum(
  'format',
  'hf',
  ['hf', 'gguf'],
  'Layout of the files: hf for transformers, gguf for llama.cpp.',
  flag_values=_FLAGS,
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  'float32',
  ['float32', 'bfloat16'],
  'Type of the weights in the files.',
  flag_values=_FLAGS,
)
_VERIFY = flags.DEFINE_enum(
  'verify',
  'auto',
  ['auto', 'transformers'],
  'auto compares with transformers if it is installed; transformers requires '
  'it.',
  flag_values=_FLAGS,
)


def export(
  workdir: str | pathlib.Path,
  out: str | pathlib.Path,
  *,
  step: str | int = 'best',
  format: str = 'hf',
  dtype: str = 'float32',
  verify: str = 'auto',
) -> dict[str, Any]:
  """Writes a checkpoint for transformers or llama.cpp, and verifies it.

  Args:
    workdir: Directory of the run.
    out: Directory of the export, which must not exist.
    step: Step of the checkpoint: a number, 'best' or 'latest'.
    format: Layout of the files: 'hf' for transformers, 'gguf' for llama.cpp.
    dtype: Type of the weights in the files, 'float32' or 'bfloat16'.
    verify: 'auto', or 'transformers' to require that library.

  Returns:
    The class or architecture of the model, and the results of the verification,
    as JSON values.

  Raises:
    UserError: There is no such run or checkpoint, a line for each option that
      the format has no place for, or the files differ from the checkpoint.
      Nothing is left at `out`.
  """
  workdir = pathlib.Path(home.expand(str(workdir), '--workdir'))
  out = pathlib.Path(home.expand(str(out), '--out'))
  config = workdir_lib.config_of(workdir)
  if out.exists() or out.is_symlink():
    raise UserError(f'--out={out}: it exists; it must be a new directory')
  if lines := workdir_lib.problems(out):
    raise UserError([line.replace('--workdir=', '--out=', 1) for line in lines])
  if format == 'gguf' and not importlib.util.find_spec('gguf'):
    raise UserError(
      "--format=gguf: gguf is not installed; install 'nanomoe[gguf]'"
    )
  if format == 'gguf' and verify != 'auto':
    raise UserError(
      f'--verify={verify}: transformers does not read the file of '
      '--format=gguf; it must be auto'
    )

  backend.start()
  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.portable import verify as verify_lib  # noqa: PLC0415

  if format == 'gguf':  # Its package is optional.
    from nanomoe.portable import gguf_exporter as exporter  # noqa: PLC0415
  else:
    from nanomoe.portable import exporter  # noqa: PLC0415

  if lines := exporter.problems(workdir, config):
    raise UserError(lines)
  if verify == 'transformers' and not verify_lib.has_transformers():
    raise UserError(
      "--verify=transformers: it is not installed; install 'nanomoe[hf]'"
    )
  partial = out.with_name(f'{out.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # An export was killed.
  try:
    partial.mkdir(parents=True)
    result = exporter.write(
      workdir,
      config,
      experiment.restore(config, workdir, str(step)),
      partial,
      out,
      dtype,
    )
    partial.rename(out)
  except OSError as error:
    reason = error.strerror or error  # NumPy gives no number.
    raise UserError(f'--out={out}: {reason}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return result


def _parse(argv: list[str]) -> None:
  cli.parse_flags(argv, _FLAGS, _USAGE)


def main(_: None) -> int:
  """Exports the checkpoint that the flags name; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  result = export(
    _WORKDIR.value,
    _OUT.value,
    step=_STEP.value,
    format=_FORMAT.value,
    dtype=_DTYPE.value,
    verify=_VERIFY.value,
  )
  print(to_json(result, indent=2))
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
