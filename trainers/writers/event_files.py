"""Names and times of event files, which TensorBoard reads in name order."""

from collections.abc import Iterable, Iterator
import contextlib
import pathlib
import re
import struct
import time
from typing import BinaryIO

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

PREFIX = 'events.out.tfevents.'
# A wall time after the year 9999 is the content of a damaged file.
_LAST_SECOND = 253_402_300_799


class WallClock:
  """Clock of a run's events, in seconds since 1970, that never decreases.

  The system clock may be set back between two starts, or during one.
  TensorBoard also draws charts by wall time, where a line would run backwards.
  While the system clock is behind, time continues from the newest event.
  Intervals between events remain those of the system clock.

  Args:
    files: Earlier event files of the run.
  """

  def __init__(self, files: Iterable[pathlib.Path] = ()):
    self._newest = max(map(newest_time, files), default=0.0)
    self._behind = 0.0  # Seconds.

  def __call__(self) -> float:
    now = time.time()
    if now >= self._newest:
      self._behind = 0.0
    elif now + self._behind < self._newest:
      self._behind = self._newest - now
    self._newest = max(self._newest, now + self._behind)
    return self._newest


def in_directory(directory: pathlib.Path) -> list[pathlib.Path]:
  """Returns the event files in `directory`, in TensorBoard's order."""
  return sorted(p for p in directory.glob(f'{PREFIX}*') if p.is_file())


def next_name(directory: pathlib.Path, now: float, source: str) -> str:
  """Returns the name of a new event file, which sorts after the existing ones.

  TensorBoard sorts the files of a directory by name. A name begins with the
  time of the clock. If the clock was set back, the name begins with the
  smallest number after the last name instead.

  Args:
    directory: Directory of the event files.
    now: Seconds since 1970, at least 0.
    source: End of the name.

  Returns:
    The name, without the directory.
  """
  # Zero-padding makes names sort like numbers: 9 seconds before 10.
  stamp = f'{now:017.6f}'
  name = f'{PREFIX}{stamp}.{source}'
  names = [path.name for path in directory.glob(f'{PREFIX}*')]
  last = max(names, default='')
  if name <= last:
    name = f'{PREFIX}{_after(last.removeprefix(PREFIX), stamp)}.{source}'
  return name


def _after(last: str, stamp: str) -> str:
  """Returns text that sorts after `last`, the end of a name in ASCII."""
  tildes = re.match('~*', last)[0]  # pyright: ignore
  number = re.match(r'[0-9]+(\.[0-9]+)?', last[len(tildes) :])
  if number:
    whole, dot, part = number[0].partition('.')
    digits = whole + part
    more = f'{int(digits) + 1:0{len(digits)}}'
    if len(more) == len(digits):
      return tildes + more[: len(whole)] + dot + more[len(whole) :]
  # `~` is the last printable character of ASCII: it sorts after numbers that
  # cannot be increased, which have nines alone, and after other text.
  return f'{tildes}~{stamp}'


def newest_time(path: pathlib.Path) -> float:
  """Returns the newest wall time of the events in a file.

  A damaged event ends the file, as it does for TensorBoard.

  Args:
    path: Event file.

  Returns:
    Seconds since 1970; 0 if the file has no events or cannot be read.
  """
  with contextlib.suppress(OSError), path.open('rb') as file:
    end = file.seek(0, 2)
    while newest := max(_times(file, end), default=None):
      seconds, start, size = newest
      file.seek(start)
      data, crc = file.read(size), file.read(4)
      if crc == struct.pack('<I', masked_crc32c(data)):
        return seconds
      end = start
  return 0.0


def _times(file: BinaryIO, end: int) -> Iterator[tuple[float, int, int]]:
  """Yields (wall time, start, size) of the events that end before `end`."""
  # A record is a size (8 bytes), its CRC (4), an event, and its CRC (4).
  start = 12
  while start + 4 <= end:
    file.seek(start - 12)
    head = file.read(21)
    size = int.from_bytes(head[:8], 'little')
    if start + size + 4 > end:
      return
    # An event begins with its wall time: a field number (1 byte), a double (8).
    if size >= 9 and head[12] == 9:
      (seconds,) = struct.unpack('<d', head[13:])
      if 0 <= seconds <= _LAST_SECOND:  # False for NaN, too.
        yield seconds, start, size
    start += size + 16
