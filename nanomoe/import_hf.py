"""Command that makes a run of a model of Hugging Face transformers."""

import json
import logging
import pathlib
import shutil
import sys
from typing import Any

from absl import flags

from nanomoe.config import help as help_lib
from nanomoe.config import home, schema
from nanomoe.config import overrides as config_lib
from nanomoe.run import backend, cli, terminal
from nanomoe.run import workdir as workdir_lib
from trainers.errors import UserError
from trainers.files import to_json

log = logging.getLogger('nanomoe.import_hf')

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.import_hf --path=DIR --workdir=RUN

Makes a run whose step 0 has the weights and the tokenizer in DIR, a directory
of Hugging Face transformers. evaluate, generate, --init_from=RUN and training,
python -m nanomoe.main --workdir=RUN, work as with any run. No code in DIR
is run, and no pickled weights are read.
"""
_FLAGS = flags.FlagValues()
_PATH = flags.DEFINE_string(
  'path',
  None,
  'Directory with config.json, safetensors files and tokenizer.json.',
  required=True,
  flag_values=_FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Directory of the new run, which must not exist.',
  required=True,
  flag_values=_FLAGS,
)
_CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
_CONFIG = flags.DEFINE_string(
  'config',
  str(_CONFIGS / 'base.py'),
  'Python file with get_config(), for what DIR does not state: the text, the '
  'optimizer and the schedule. --config.KEY=VALUE sets a key.',
  flag_values=_FLAGS,
)


def import_hf(
  path: str | pathlib.Path,
  workdir: str | pathlib.Path,
  config: schema.Config,
) -> dict[str, Any]:
  """Makes a run of a model of transformers.

  Args:
    path: Directory with config.json, safetensors files and tokenizer.json.
    workdir: Directory of the new run, which must not exist.
    config: Config of the run, as of `config_of`.

  Returns:
    The workdir, the class of the model and the loss of step 0, as JSON values.

  Raises:
    UserError: The files are damaged or do not fit each other, or the text does
      not fit the tokenizer. Nothing is left at `workdir`.
  """
  path, workdir = pathlib.Path(path), pathlib.Path(workdir)
  if workdir.exists() or workdir.is_symlink():
    raise UserError(
      f'--workdir={workdir}: it exists; it must be a new directory'
    )
  if lines := workdir_lib.problems(workdir):
    raise UserError(lines)
  backend.start()
  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)
  from nanomoe.data import corpus as corpus_lib  # noqa: PLC0415
  from nanomoe.data import pipeline, tokenizer_files  # noqa: PLC0415
  from nanomoe.portable import classes, importer  # noqa: PLC0415

  hf = classes.find(config)
  if lines := classes.problems(config):
    raise UserError(lines)
  assert hf, 'it has no problems'
  config = importer.without_zero_shared(path, config)
  _, state = tokenizer_files.from_json(_read_json(path / 'tokenizer.json'))
  corpus = corpus_lib.find(config.data.path, config.data.fallback)
  partial = workdir.with_name(f'{workdir.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # An import was killed.
  try:
    partial.mkdir(parents=True)
    workdir_lib.write_json(
      partial / pipeline.VOCABULARY,
      {
        **state,
        'type': config.data.tokenizer.type,
        'corpus': corpus.name,
        'corpus_sha256': corpus.fingerprint,
      },
    )
    trainer = experiment.build(
      config, partial, initial=importer.initial(path, config)
    )
    trainer.callbacks.append(importer.StopAtStart())
    status = trainer.fit()
    if status != 'done':
      raise UserError(f'--workdir={workdir}: {trainer.stop_reason}')
    partial.rename(workdir)
  except OSError as error:
    raise UserError(f'--workdir={workdir}: {error.strerror}') from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return {
    'workdir': str(workdir),
    'class': hf.name,
    'val_cross_entropy': trainer.best and trainer.best.value,
  }


def config_of(
  path: pathlib.Path, config_path: str, overrides: list[config_lib.Override]
) -> schema.Config:
  """Returns the config of a run of a model of transformers.

  Args:
    path: Directory of the model.
    config_path: Config file of what the directory does not state.
    overrides: Keys and values of the command line, which take precedence.

  Raises:
    UserError: A line for each mistake, or each property of the model that this
      package lacks.
  """
  values = _read_json(path / 'config.json')
  tokenizer = _read_json(path / 'tokenizer.json')
  backend.import_jax()
  from nanomoe.data import tokenizer_files, tokenizers  # noqa: PLC0415
  from nanomoe.portable import config_json  # noqa: PLC0415 (JAX takes seconds)

  try:
    if not isinstance(values, dict):
      raise ValueError('it must be an object with keys')
    found = config_json.read(values)
  except ValueError as error:
    raise UserError(
      [f'{path / "config.json"}: {line}' for line in str(error).splitlines()]
    ) from error
  try:
    spec, state = tokenizer_files.from_json(tokenizer)
    learned = tokenizers.build(spec)
    learned.load_state_dict(state)
  except ValueError as error:
    raise UserError(f'{path / "tokenizer.json"}: {error}') from error
  rows = values.get('vocab_size')
  if type(rows) is not int or rows < learned.vocab_size:
    raise UserError(
      f'{path / "config.json"}: vocab_size={rows!r}: it must be at least the '
      f'{learned.vocab_size} tokens of tokenizer.json'
    )
  found['model.vocab_rows'] = 0 if rows == learned.vocab_size else rows
  config = config_lib.load_file(config_path).to_dict()
  config['data']['tokenizer'] = spec
  if 'moe.router.type' in found:
    config['moe']['router'] = {}
  for key, value in found.items():
    *sections, name = key.split('.')
    section = config
    for part in sections:
      section = section[part]
    section[name] = value
  return config_lib.apply(schema.make(config), overrides)


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'{path}: {str(error.strerror).lower()}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: the file is damaged ({error})') from error


def _parse(argv: list[str]) -> list[config_lib.Override]:
  """Returns the overrides. Absl parses the other words."""
  argv, overrides = config_lib.split_arguments(argv)
  cli.parse_flags(argv, _FLAGS, _USAGE, lambda: help_lib.keys(None))
  return overrides


def main(overrides: list[config_lib.Override]) -> int:
  """Makes the run that the flags name; returns the exit code."""
  terminal.log_to_terminal(sys.stderr)
  path = pathlib.Path(home.expand(_PATH.value, '--path'))
  workdir = pathlib.Path(home.expand(_WORKDIR.value, '--workdir'))
  config = config_of(path, _CONFIG.value, overrides)
  print(to_json(import_hf(path, workdir, config), indent=2))
  return 0


if __name__ == '__main__':
  cli.run(main, _parse)
