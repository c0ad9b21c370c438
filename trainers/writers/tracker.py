"""Base class of writers for experiment trackers, and the journal of a run."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

import numpy as np

from trainers.files import to_json, write_atomically
from trainers.writers import png
from trainers.writers.writers import Writer


class Journal:
  """Scalars, texts and images of a run, for trackers that cannot delete.

  A resumed run gives the tracker the kept records again. A record is a line of
  JSON; the images are PNG files beside it.

  Args:
    directory: Directory of the journal.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._path = directory / 'journal.jsonl'

  def keep(self, step: int) -> Iterator[dict[str, Any]]:
    """Removes the records after `step`, and yields the others.

    Args:
      step: Last step that is kept.
    """
    self._directory.mkdir(parents=True, exist_ok=True)
    kept = [r for r in self._read() if r['step'] <= step]
    write_atomically(self._path, ''.join(to_json(r) + '\n' for r in kept))
    yield from kept

  def add(self, record: Mapping[str, Any]) -> None:
    """Appends a record: `step`, `kind` and `values` by name."""
    with self._path.open('a', encoding='utf-8') as file:
      file.write(to_json(record) + '\n')

  def _read(self) -> Iterator[dict[str, Any]]:
    try:
      text = self._path.read_text(encoding='utf-8')
    except FileNotFoundError:
      return
    for line in text.split('\n')[:-1]:  # kill -9 can leave a part of a line.
      yield json.loads(line)


class Tracker(Writer):
  """Base class of writers for experiment trackers.

  Args:
    workdir: Directory of the run.
    name: Name of the tracker. `<workdir>/<name>.json` identifies its run.
  """

  def __init__(self, workdir: pathlib.Path, name: str):
    self._workdir = workdir
    self._id_file = workdir / f'{name}.json'

  def _load(self) -> dict[str, Any]:
    """Returns what identifies the tracker's run; {} before the first start."""
    try:
      return json.loads(self._id_file.read_text(encoding='utf-8'))
    except FileNotFoundError:
      return {}

  def _store(self, identity: Mapping[str, Any]) -> None:
    write_atomically(self._id_file, to_json(identity) + '\n')

  def _result(self) -> dict[str, Any]:
    """Returns the numbers and texts of result.json."""
    try:
      text = (self._workdir / 'result.json').read_text(encoding='utf-8')
      values = json.loads(text)
    except (OSError, ValueError):
      return {'status': 'running'}
    kinds = (bool, int, float, str)
    return {k: v for k, v in values.items() if isinstance(v, kinds)}

  def _save_images(
    self, directory: pathlib.Path, step: int, images: Mapping[str, Any]
  ) -> dict[str, list[str]]:
    """Writes images as PNG files.

    Args:
      directory: Directory of the files.
      step: Step of the images.
      images: Images by name, as of `png.pixels`.

    Returns:
      Paths in `directory` by name.
    """
    paths: dict[str, list[str]] = {}
    for name, value in images.items():
      for i, image in enumerate(png.pixels(np.asarray(value))):
        path = pathlib.PurePath(name, f'{step:08d}-{i}.png')
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(png.encode(image))
        paths.setdefault(name, []).append(str(path))
    return paths
