"""Names of event files, and the times of their events."""

import itertools
import struct
import time

import pytest

from trainers.writers import event_files
from trainers.writers.event_files import (
  PREFIX,
  WallClock,
  newest_time,
  next_name,
)
from trainers.writers.tensorboard import SummaryWriter

NOW = 1_790_000_000.25


@pytest.mark.reported('16')
@pytest.mark.parametrize(
  'last',
  [
    '0.session',
    '1790000000.250000.host.7',  # The same moment.
    '1790000000.250000.zzz.7',
    '1790000000.999999.host.7',
    '1799999999.999999.host.7',
    '4102444800.000000.host.7',  # The year 2100.
    '10413792000.000000.host.7',  # The year 2300: as text, before 2026.
    '9.500000.host.7',  # 1970, without leading zeros.
    '9999999999.999999.host.7',
    '1799999999.host.7.2.v2',  # As TensorFlow names them.
    '1799999999.192.168.0.1.7',
    '1799999999',
    'host',
    '~',
    '~~0000000009.500000.host.7',
    '~9999999999.999999.host.7',
  ],
)
def test_a_new_name_sorts_behind_all_others(tmp_path, last):
  for name in (last, '0.session', '1600000000.000000.host.7'):
    (tmp_path / f'{PREFIX}{name}').touch()
  names = [f'{PREFIX}{last}']
  for now in (NOW, NOW, 5.0, 0.0, NOW + 1, 12.0, 4.2e9, NOW):
    names.append(next_name(tmp_path, now, 'another.1'))
    (tmp_path / names[-1]).touch()
  assert names == sorted(set(names))
  assert max(map(len, names)) < len(PREFIX) + 40  # However many starts.


@pytest.mark.reported('16')
def test_a_name_tells_the_time_if_the_clock_is_right(tmp_path):
  (tmp_path / f'{PREFIX}1789999999.000000.host.7').touch()
  assert next_name(tmp_path, NOW, 'a') == f'{PREFIX}1790000000.250000.a'
  assert next_name(tmp_path / 'b', 9, 'a') == f'{PREFIX}0000000009.000000.a'


@pytest.mark.reported('16')
def test_times_never_decrease_and_recover(monkeypatch):
  def times(*clock):
    ticks = iter(clock)
    monkeypatch.setattr(time, 'time', lambda: next(ticks))
    now = WallClock()
    return [now() for _ in clock]

  assert times(5, 6, 6, 9) == [5, 6, 6, 9]
  # An hour back, and right again.
  assert times(7000, 3400, 3410, 3410, 7020) == [7000, 7000, 7010, 7010, 7020]
  # Back once more, while it is behind.
  assert times(100, 50, 60, 20, 25, 200) == [100, 100, 110, 110, 115, 200]
  assert times(-5, -4, 3) == [0, 1, 3]  # Before 1970.


def written(directory, monkeypatch, *clock):
  """An event file whose events have these times."""
  ticks = itertools.chain(clock, itertools.repeat(clock[-1]))
  monkeypatch.setattr(time, 'time', lambda: next(ticks))
  writer = SummaryWriter(directory, clock=WallClock())
  for step in range(1, len(clock)):
    writer.write_scalars(step, {'x': step})
  writer.close()
  return event_files.in_directory(directory)[-1]


@pytest.mark.reported('16')
def test_the_newest_time_of_a_file_is_found(tmp_path, monkeypatch):
  path = written(tmp_path, monkeypatch, 10.0, 20.5, 30.25)
  assert newest_time(path) == 30.25
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])  # As `kill -9` leaves it.
  assert newest_time(path) == 20.5
  place = whole.rindex(struct.pack('<d', 30.25))
  for bit in range(64):  # Of the last time: 60.5, or 1e200, or NaN.
    damaged = bytearray(whole)
    damaged[place + bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    assert newest_time(path) == 20.5, bit
  path.write_bytes(b'')
  assert newest_time(path) == 0
  path.write_bytes(b'\xff' * 1000)
  assert newest_time(path) == 0
  assert newest_time(tmp_path / 'none') == 0
