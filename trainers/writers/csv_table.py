"""Metric writer of one CSV table: a row for each step, a column per metric."""

from collections.abc import Mapping
import csv
import io
import os
import pathlib
from typing import Any, TextIO

import numpy as np

from trainers.files import write_atomically
from trainers.writers.writers import Writer


class Csv(Writer):
  """Metric writer of `<workdir>/metrics.csv`, with one row for each step.

  The first column is `step`. A metric that was not recorded at a step is an
  empty cell. A resumed run removes the rows of steps that it repeats.

  Args:
    workdir: Directory of the run.
    name: Name of the file in that directory.
  """

  def __init__(self, workdir: pathlib.Path, name: str = 'metrics.csv'):
    if pathlib.PurePath(name).name != name or not name.endswith('.csv'):
      raise ValueError(f'{name=}: it must be the name of a file, such as a.csv')
    self._path = workdir / name
    self._columns: list[str] = []
    self._row: dict[str, Any] = {}
    self._start = 0  # Offset of the last row, which may get more cells.
    self._file: TextIO | None = None

  def start(self, step: int, hparams: Mapping[str, Any]) -> None:
    rows = [row for row in self._read() if int(row['step']) <= step]
    names = {name for row in rows for name, cell in row.items() if cell}
    self._columns = ['step', *sorted(names - {'step'})]
    last = rows.pop() if rows else {}
    self._rewrite(rows)
    self._row = {}
    if last:  # Hooks that the checkpoint has left to run may add cells.
      cells = {name: cell for name, cell in last.items() if cell}
      self._put({**cells, 'step': int(last['step'])})

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    cells = {name: float(np.asarray(x)) for name, x in scalars.items()}
    if added := sorted(set(cells) - set(self._columns)):
      rows = self._read()
      self._columns += added
      self._rewrite(rows)
    self._put({'step': step, **cells})

  def _put(self, cells: dict[str, Any]) -> None:
    """Writes cells into the last row if it has their step, else a new row."""
    assert self._file
    is_same = self._row.get('step') == cells['step']
    self._row = {**self._row, **cells} if is_same else cells
    if not is_same:
      self._start = self._file.seek(0, os.SEEK_END)
    self._file.seek(self._start)
    self._file.write(_text([self._row], self._columns))
    self._file.truncate()
    self._file.flush()

  def close(self) -> None:
    if self._file:
      self._file.close()

  def _read(self) -> list[dict[str, str]]:
    """Returns the complete rows of the file."""
    try:
      text = self._path.read_text(encoding='utf-8')
    except FileNotFoundError:
      return []
    # kill -9 can leave a part of a row.
    whole = text[: text.rfind('\n') + 1]
    rows = csv.DictReader(io.StringIO(whole, newline=''))
    # A row with more cells than the header has them under None.
    return [
      {name: cell for name, cell in row.items() if name}
      for row in rows
      if (row.get('step') or '').isdecimal()
    ]

  def _rewrite(self, rows: list[dict[str, str]]) -> None:
    """Replaces the file by a header and rows, in one atomic step."""
    if self._file:
      self._file.close()
    head = dict(zip(self._columns, self._columns, strict=True))
    before = _text([head, *rows[:-1]], self._columns)
    text = before + _text(rows[-1:], self._columns)
    write_atomically(self._path, text)
    self._file = self._path.open('r+', encoding='utf-8', newline='')
    self._start = len(before.encode())


def _text(rows: list[Any], columns: list[str]) -> str:
  """Returns rows as CSV."""
  text = io.StringIO(newline='')
  writer = csv.DictWriter(
    text, columns, lineterminator='\n', extrasaction='ignore'
  )
  writer.writerows(rows)
  return text.getvalue()
