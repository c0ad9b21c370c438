"""python -m nanomoe.main --config=configs/base.py --config.key=value

Flags are parsed before JAX is imported: a mistake is answered at once.
"""

import logging
import os
import pathlib
import signal
import sys

from absl import app, flags

from nanomoe import config as config_lib
from nanomoe import workdir as workdir_lib
from trainers.errors import UserError

log = logging.getLogger('nanomoe.main')

_CONFIG = flags.DEFINE_string(
  'config', None, 'A Python file with get_config(), such as configs/base.py.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'Where the run is kept; a run that is there goes on, with its own config '
  'if --config is not given. Default: runs/<config>-<date>-<time>.',
)

EXIT_CODES = {'done': 0, 'diverged': 3, 'unsaved': 4, 'interrupted': 75}
USER_ERROR = 2


def _read_flags(argv: list[str]) -> list[config_lib.Override]:
  """Parses argv; returns the config's overrides, which absl does not know."""
  argv, overrides = config_lib.split_arguments(argv)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(str(error)) from error
  if rest[1:]:
    raise UserError(f'what is {rest[1]!r}? Options are --name=value')
  return overrides


def _main(overrides: list[config_lib.Override]) -> int:
  """Trains; returns the exit code."""
  workdir = _WORKDIR.value and pathlib.Path(_WORKDIR.value)
  old = workdir_lib.read_config(workdir) if workdir else None
  if _CONFIG.value:
    config = config_lib.load_file(_CONFIG.value)
  elif old:
    config = old
  else:
    raise UserError(
      f'{workdir / "config.json"} is missing: give --config=FILE'
      if workdir
      else '--config=FILE is needed, such as --config=configs/base.py'
    )
  config = config_lib.apply(config, overrides)
  workdir = workdir or workdir_lib.default_path(str(_CONFIG.value))
  workdir_lib.log_to_terminal()
  workdir_lib.log_to(workdir)
  if old:
    config = workdir_lib.continued(old, config)
  log.info('workdir: %s', workdir)
  log.info('watch it: tensorboard --logdir %s', workdir.parent)

  from nanomoe import experiment  # noqa: PLC0415 (JAX takes seconds)

  status = experiment.build(config, workdir).fit()
  return EXIT_CODES[status]


def _run(overrides: list[config_lib.Override] | UserError) -> int:
  # Until the trainer listens, there is nothing to save.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    if isinstance(overrides, UserError):
      raise overrides
    return _main(overrides)
  except UserError as error:
    for line in error.problems:
      print(f'error: {line}', file=sys.stderr)
    return USER_ERROR
  except KeyboardInterrupt:
    print('interrupted before the first step', file=sys.stderr)
    return EXIT_CODES['interrupted']


def _parse(argv: list[str]):
  try:
    return _read_flags(argv)
  except UserError as error:
    return error


def _exec_with_huge_pages() -> None:
  """Starts this process again, once, with an allocator that suits XLA.

  Large buffers then come in huge pages: a fault for 2 MB instead of 4 kB, which
  is a fifth of a step's time. glibc reads its tunables only at the start.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == '__main__':
  _exec_with_huge_pages()
  app.run(_run, flags_parser=_parse)
