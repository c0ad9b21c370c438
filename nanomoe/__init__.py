"""Sparse Mixture-of-Experts language models in JAX.

`nanomoe.train`, `nanomoe.load` and `nanomoe.Run` are those of `nanomoe.api`,
which is imported by the first access to one of them.
"""

import contextlib
import importlib
from importlib import machinery
from importlib import util as importlib_util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from nanomoe.api import Run, load, train

__all__ = ['Run', 'load', 'train']
__version__ = '0.1.0'

_HOME = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module('nanomoe.api'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})


def _put_current_directory_last() -> None:
  """Moves the current directory to the end of sys.path for `python -m nanomoe`.

  Python puts it first, where a file jax.py or a directory flax/ hides what is
  installed. Plug-ins in the current directory are found at the end as well.
  """
  # While `python -m` imports the package of its module, argv[0] is '-m'.
  is_command = sys.argv[:1] == ['-m'] and any(
    word.removeprefix('-m').split('.')[0] == 'nanomoe' for word in sys.orig_argv
  )
  if not is_command or sys.flags.safe_path or not sys.path:
    return
  try:
    current = os.getcwd()
  except OSError:  # Somebody deleted it.
    return
  if sys.path[0] in ('', current):
    first = sys.path.pop(0)
    # Namespace packages of dependencies, without code: a module of this name
    # wins over them from any place on sys.path.
    for name in ('google', 'orbax'):
      with contextlib.suppress(ImportError):
        importlib.import_module(name)
    sys.path.append(first)


def import_own(name: str) -> None:
  """Imports the package `name` that is installed beside this one.

  A directory of this name in the current directory would hide it: the packages
  of an editable installation are looked for after sys.path.

  Raises:
    ImportError: another package of this name has been imported before.
  """
  if name not in sys.modules:
    spec = machinery.PathFinder.find_spec(name, [_HOME])
    if spec is None or spec.loader is None:
      importlib.import_module(name)
      return
    module = importlib_util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return
  module = sys.modules[name]
  places = [*getattr(module, '__path__', ()), getattr(module, '__file__', name)]
  places = [os.path.realpath(place) for place in places]
  if os.path.join(_HOME, name) not in places:
    raise ImportError(
      f"{places[0]} was imported in place of NanoMoE's package {name!r}; "
      'rename it'
    )


_put_current_directory_last()
# Before CLU: without it, CLU wants TensorFlow.
import_own('trainers')
