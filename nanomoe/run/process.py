"""The process of a command: whether it is one, and its restart."""

from collections.abc import Callable
import contextlib
import os
import pathlib
import re
import sys
from typing import Any


def is_command(entry: Callable[..., Any]) -> bool:
  """Returns whether this process is `python -m MODULE` or the `nanomoe` script.

  It is not if another program runs the module: a notebook, runpy in a script, a
  debugger, a profiler. That program must not be started a second time.

  Args:
    entry: Function of the module that runs as `__main__`.
  """
  monitoring = getattr(sys, 'monitoring', None)  # From Python 3.12 on.
  if (
    sys.flags.inspect
    or sys.gettrace()
    or sys.getprofile()
    or (monitoring and any(monitoring.get_tool(i) for i in range(6)))
  ):
    return False
  names = getattr(entry, '__globals__', {})
  spec = names.get('__spec__')
  if spec is None or names is not vars(sys.modules['__main__']):
    return _is_script()
  return spec.name.removesuffix('.__main__') == _module_in(sys.orig_argv)


def _is_script() -> bool:
  """Returns whether this process is `python [options] .../nanomoe ...`."""
  main = sys.modules['__main__']
  file = getattr(main, '__file__', None)
  if getattr(main, '__spec__', None) is not None or file is None:
    return False
  is_ours = pathlib.Path(file).name == 'nanomoe'
  return is_ours and file in sys.orig_argv[1:]


def _module_in(words: list[str]) -> str | None:
  """Returns MODULE of `python [options] -m MODULE ...`, None if there is none.

  Options may be joined, as in `-OOm MODULE`; -c, -m, -W and -X have a value.
  """
  options = iter(words[1:])
  for word in options:
    if word == '--check-hash-based-pycs':
      next(options, None)
    if word.startswith('--'):
      continue
    match = re.fullmatch('-([^cmWX]+|[^cmWX]*([cmWX])(.*))', word, re.DOTALL)
    if not match or match[2] == 'c':
      return None  # A script, or its text.
    value = match[3] or (match[2] and next(options, None))
    if match[2] == 'm':
      return value
  return None


def exec_with_huge_pages() -> None:
  """Starts this process again, once, with an allocator that suits XLA.

  Large buffers then come in huge pages: a fault for 2 MB instead of 4 kB; the
  faults are a large part of a step's time. glibc reads its tunables only at the
  start.
  """
  is_set = 'GLIBC_TUNABLES' in os.environ
  if sys.platform == 'linux' and sys.executable and not is_set:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    with contextlib.suppress(OSError):  # Training is slower without it.
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
