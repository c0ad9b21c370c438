"""Command that trains a model or resumes a run.

Flags are parsed before JAX is imported, so that a mistake is reported at once.
"""

import logging
import os
import pathlib
import shlex

from absl import flags

from nanomoe.config import help, home, resume, schema
from nanomoe.config import overrides as config_lib
from nanomoe.data import corpus
from nanomoe.run import (
  backend,
  cli,
  cluster,
  peers,
  terminal,
  trusted_imports,
)
from nanomoe.run import workdir as workdir_lib
from nanomoe.run.terminal import RESULT
from trainers.errors import PeerError, UserError

log = logging.getLogger('nanomoe.main')

# A docstring would be missing from --help under `python -OO`.
_USAGE = """
python -m nanomoe.main --config=configs/base.py --config.batch_size=64

Trains a model. python -m nanomoe.main --workdir=DIR resumes a run.
"""

_FLAGS = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
  'config',
  None,
  'Python file with get_config(), such as configs/base.py. FILE.py:ARG calls '
  "get_config('ARG').",
  flag_values=_FLAGS,
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Directory of the run. A run in that directory is resumed, with its own '
  'config unless --config is given. Default: runs/<config>-<date>-<time>.',
  flag_values=_FLAGS,
)
_QUIET = flags.DEFINE_bool(
  'quiet',
  False,
  'Prints only warnings, errors and the place of the result.',
  short_name='q',
  flag_values=_FLAGS,
)

_INIT_FROM = flags.DEFINE_string(
  'init_from',
  None,
  'Directory of a run whose best weights this run starts from; equal to '
  '--config.init_from.',
  flag_values=_FLAGS,
)
_ALLOW_IMPORTS = trusted_imports.define_flag(_FLAGS)

_ALLOW_CHANGED = flags.DEFINE_list(
  'allow_changed',
  [],
  f'Names among {",".join(resume.ALLOWABLE)} that may differ from the run that '
  'is resumed.',
  flag_values=_FLAGS,
)

_CLUSTER = cluster.define_flags(_FLAGS)

STOPPED = 3
EXIT_CODES = {
  'done': 0,
  'diverged': STOPPED,
  'collapsed': STOPPED,
  'unsaved': 4,
  'interrupted': cli.INTERRUPTED,
}


def _parse(argv: list[str]) -> list[config_lib.Override]:
  """Returns the overrides. Absl parses the other words."""
  argv, overrides = config_lib.split_arguments(argv)
  cli.parse_flags(argv, _FLAGS, _USAGE, lambda: _keys_help(argv))
  for name in _ALLOW_CHANGED.value:
    if name not in resume.ALLOWABLE:
      raise UserError(
        f'--allow_changed={name}: it must be one of '
        f'{", ".join(resume.ALLOWABLE)}'
      )
  if _INIT_FROM.value:
    overrides.append(('init_from', _INIT_FROM.value))
  return overrides


def _keys_help(argv: list[str]) -> str:
  """Returns the table of keys, with the values of --config if it is given."""
  paths = [w.partition('=')[2] for w in argv if w.startswith('--config=')]
  where, config = '--config=FILE --help shows its values', None
  if paths:
    where = f'[the value in {paths[-1]}]'
    config = config_lib.load_file(paths[-1]).to_dict()
  title = f'--config.KEY=VALUE sets a key; {where}:'
  return f'{title}\n\n{help.keys(config)}'


def _workdir() -> pathlib.Path | None:
  """Returns --workdir, if it is given."""
  if not _WORKDIR.value:
    return None
  return pathlib.Path(home.expand(_WORKDIR.value, '--workdir'))


def requested_config(
  overrides: list[config_lib.Override],
) -> tuple[config_lib.Config, config_lib.Config | None]:
  """Returns the checked config of the flags, and the config of the run if any.

  Raises:
    UserError: A line for each mistake. Nothing was written.
  """
  workdir = _workdir()
  old = workdir_lib.read_config(workdir) if workdir else None
  if _CONFIG.value:
    config = config_lib.load_file(_CONFIG.value)
  elif old:
    config = old
  else:
    raise UserError(
      f'{workdir / "config.json"} is missing; give --config=FILE'
      if workdir
      else '--config is missing; give --config=FILE, such as configs/base.py'
    )
  config = checked(config, overrides, workdir, is_new=old is None)
  if not _CONFIG.value:
    given = {value for key, value in overrides if key.endswith('.type')}
    named = trusted_imports.paths(config.to_dict())
    trusted_imports.check(named - given, _ALLOW_IMPORTS.value)
  return config, old


def main(overrides: list[config_lib.Override]) -> int:
  """Trains; returns the exit code."""
  config, old = requested_config(overrides)
  place = _CLUSTER.resolve()
  is_first = place is None or place.process_id == 0
  console = terminal.log_to_terminal(quiet=_QUIET.value or not is_first)
  if place:
    log.info('%s', place)
    cluster.connect(place, _CLUSTER.start_timeout.value)
    peers.watch(_CLUSTER.hang_timeout.value)
    # Devices wait for all processes: a process that starts a new run must not
    # wait for one that resumes.
    peers.check_equal({'--workdir': _WORKDIR.value, 'resumes': bool(old)})
  if not old:
    backend.start()  # Reports mistakes before a directory is made.
  made: list[pathlib.Path] = []
  try:
    if place:
      workdir = peers.first(lambda: _open_workdir(made))
    else:
      workdir = _open_workdir(made)
    workdir = pathlib.Path(workdir)
    if place:
      peers.check_shared(workdir)
      if not is_first:
        workdir_lib.log_warnings_to(workdir, place.process_id)
    if old:
      names = [key for key, _ in overrides]
      config = resume.resume_config(old, config, names, _ALLOW_CHANGED.value)
      backend.start()

    from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)

    trainer = experiment.build(config, workdir, _ALLOW_CHANGED.value)
  except (UserError, PeerError, KeyboardInterrupt):
    for path in made:
      workdir_lib.discard(path)
    raise
  watch = shlex.join(['tensorboard', '--logdir', str(workdir.parent)])
  log.info('workdir: %s', workdir)
  log.info('watch it with: %s', watch)
  if console and is_first and not _QUIET.value:
    from trainers.callbacks.live_progress import LiveProgress  # noqa: PLC0415

    trainer.callbacks.append(LiveProgress(console))
  code = exit_code(trainer.fit())
  if is_first:
    report(trainer, workdir, trusted_imports.paths(config.to_dict()))
  if place:
    peers.finish(code)
  return code


def _open_workdir(made: list[pathlib.Path]) -> str:
  """Makes and locks the workdir; returns its path.

  Args:
    made: Receives the path of a new directory. The caller removes the directory
      if a signal comes while other processes still start.
  """
  given = _workdir()
  is_made = given is None or not given.exists()
  workdir = given or workdir_lib.make_default(str(_CONFIG.value))
  workdir_lib.log_to(workdir)
  if is_made:
    made.append(workdir)
  return str(workdir)


def exit_code(status: str) -> int:
  """Returns the exit code of a status, which a callback may have chosen."""
  return EXIT_CODES.get(status, STOPPED)


def checked(
  config: config_lib.Config,
  overrides: list[config_lib.Override],
  workdir: pathlib.Path | None,
  is_new: bool,
) -> config_lib.Config:
  """Returns the config with its overrides.

  Args:
    config: Config of a file or of a run.
    overrides: Keys and values.
    workdir: Directory of the run, if it is given.
    is_new: Whether the run has not begun.

  Raises:
    UserError: A line for each mistake in the config and in the paths.
  """
  lines = []
  given = {**dict(schema.flatten(config.to_dict())), **dict(overrides)}
  # An unknown home directory is reported by config_lib.apply.
  if path := os.path.expanduser(str(given.get('data.path') or '')):
    lines += [] if path[0] == '~' else corpus.path_problems(path)
  if workdir:
    lines += workdir_lib.problems(workdir)
  source = os.path.expanduser(str(given.get('init_from') or ''))
  # A run that is resumed has weights of its own.
  if (
    is_new
    and source
    and source[0] != '~'
    and workdir_lib.read_config(pathlib.Path(source)) is None
  ):
    lines.append(f'init_from={source!r}: there is no run (no config.json)')
  try:
    config = config_lib.apply(config, overrides)
  except UserError as error:
    lines = error.problems + lines
  if lines:
    raise UserError(lines)
  return config


def report(trainer, workdir: pathlib.Path, named: set[str]) -> None:
  """Logs the end of the run, and the command that resumes it."""
  import jax  # noqa: PLC0415 (it takes seconds)

  status, step = trainer.status, f'{trainer.step}/{trainer.num_train_steps}'
  best = trainer.best
  if status == 'done':
    reason = f' ({trainer.stop_reason})' if trainer.stop_reason else ''
    score = f'; best val {best.value:.4f} at step {best.step}' if best else ''
    log.info(
      'done: step %s%s%s; the results are in %s',
      step,
      reason,
      score,
      workdir,
      extra=RESULT,
    )
  elif status == 'interrupted':
    words = ['python', '-m', 'nanomoe.main', f'--workdir={workdir}']
    if named:  # Another machine may not know these imports.
      words.append(f'--allow_imports={",".join(sorted(named))}')
    log.info(
      'interrupted by %s; step %s is saved',
      trainer.stop_reason,
      step,
      extra=RESULT,
    )
    command = shlex.join(words)
    if jax.process_count() > 1:
      command += ', with the flags of the processes'
    log.info('resume with: %s', command, extra=RESULT)
  else:
    log.error('%s at step %s: %s', status, step, trainer.stop_reason)


if __name__ == '__main__':
  cli.run(main, _parse)
