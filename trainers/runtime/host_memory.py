"""Memory that the operating system can still give to this process."""

from collections.abc import Iterator
import contextlib
import pathlib
import resource


def free(root: pathlib.Path = pathlib.Path('/')) -> int | None:
  """Returns the smallest of what the host and each limit leave, in bytes.

  The limits are those of the control groups of this process (version 1 and 2,
  and all groups above its own), of the address space and of the data segment.

  Args:
    root: The directory that holds `proc` and `sys`.

  Returns:
    None if nothing is known: the system is not Linux.
  """
  amounts = [
    *_of_host(root / 'proc/meminfo'),
    *_of_control_groups(root / 'proc/self/cgroup', root / 'sys/fs/cgroup'),
    *_of_process(root / 'proc/self/status'),
  ]
  return max(min(amounts), 0) if amounts else None


def _of_host(meminfo: pathlib.Path) -> Iterator[int]:
  """Returns the bytes that Linux can allocate without swapping."""
  kilobytes = _table(meminfo).get('MemAvailable:')
  if kilobytes is not None:
    yield 1024 * kilobytes


# Names of the limit, the use, and the part of the use that can be reclaimed.
_VERSION_1 = ('memory.limit_in_bytes', 'memory.usage_in_bytes')
_VERSION_2 = ('memory.max', 'memory.current')
_RECLAIMABLE = {_VERSION_1: 'total_inactive_file', _VERSION_2: 'inactive_file'}


def _of_control_groups(
  membership: pathlib.Path, mounted: pathlib.Path
) -> Iterator[int]:
  """Yields the bytes that the limit of each control group leaves.

  Args:
    membership: The list of the groups: `hierarchy:controllers:path` lines.
    mounted: Where the groups are mounted.
  """
  for line in _lines(membership):
    hierarchy, _, rest = line.partition(':')
    controllers, _, path = rest.partition(':')
    if hierarchy == '0' and not controllers:
      names, mounts = _VERSION_2, ('', 'unified')
    elif 'memory' in controllers.split(','):
      names, mounts = _VERSION_1, ('memory', controllers)
    else:
      continue
    # Without a namespace of its own, a container sees the host's path, but its
    # own group as the root: then only the root exists here.
    parts = [p for p in path.split('/') if p not in ('', '.', '..')]
    for mount in dict.fromkeys(mounts):
      for depth in range(len(parts), -1, -1):
        group = mounted.joinpath(mount, *parts[:depth])
        yield from _of_group(group, names)


def _of_group(group: pathlib.Path, names: tuple[str, str]) -> Iterator[int]:
  limit, used = (_number(group / name) for name in names)
  if limit is not None:
    # The kernel reclaims cached pages of files before it kills a process.
    cached = _table(group / 'memory.stat').get(_RECLAIMABLE[names], 0)
    yield limit - max((used or 0) - cached, 0)


def _of_process(status: pathlib.Path) -> Iterator[int]:
  """Yields the bytes that `ulimit -v` and `ulimit -d` leave."""
  used = _table(status)
  for limit, name in (('RLIMIT_AS', 'VmSize:'), ('RLIMIT_DATA', 'VmData:')):
    if not hasattr(resource, limit) or name not in used:
      continue
    soft, _ = resource.getrlimit(getattr(resource, limit))
    if soft != resource.RLIM_INFINITY:
      yield soft - 1024 * used[name]


def _lines(path: pathlib.Path) -> list[str]:
  """The lines of a file of the kernel; none if it cannot be read."""
  try:
    return path.read_text(errors='replace').splitlines()
  except OSError:
    return []


def _number(path: pathlib.Path) -> int | None:
  """The number in a file; None for 'max' and where there is no such file."""
  text = ''.join(_lines(path)).strip()
  return int(text) if text.isdecimal() else None


def _table(path: pathlib.Path) -> dict[str, int]:
  """{name: number} of lines that begin with a name and a number."""
  found = {}
  for line in _lines(path):
    words = line.split()
    with contextlib.suppress(ValueError, IndexError):
      found[words[0]] = int(words[1])
  return found
