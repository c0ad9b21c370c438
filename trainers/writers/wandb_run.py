"""Metric writer of Weights & Biases."""

from collections.abc import Mapping
import html
import importlib
import pathlib
import shutil
from typing import Any
import uuid

import numpy as np

from trainers.writers.tracker import Journal, Tracker

MODES = ('offline', 'online')


class Wandb(Tracker):
  """Metric writer of Weights & Biases, which sends nothing by default.

  The offline run is in `<workdir>/wandb`; `wandb sync` uploads it. A resumed
  run keeps the id of the tracker's run. Offline, its history is written anew
  without the steps that are repeated. Online, the server ignores steps that it
  has already.

  Args:
    workdir: Directory of the run.
    project: Name of the project.
    entity: User or team; '' selects the default one.
    mode: 'offline' or 'online'.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    project: str = 'nanomoe',
    entity: str = '',
    mode: str = 'offline',
  ):
    super().__init__(workdir, 'wandb')
    if mode not in MODES:
      raise ValueError(f'{mode=}: it must be one of {", ".join(MODES)}')
    try:
      self._wandb: Any = importlib.import_module('wandb')
    except ImportError as error:
      raise ValueError(
        "wandb is not installed; run pip install 'nanomoe[wandb]'"
      ) from error
    self._project, self._entity, self._mode = project, entity, mode
    self._directory = workdir / 'wandb'
    self._images = self._directory / 'journal' / 'images'
    self._journal: Journal | None = None
    if mode == 'offline':
      self._journal = Journal(self._directory / 'journal')
    self._run: Any = None

  def start(self, step: int, hparams: Mapping[str, Any]) -> None:
    if self._run:  # A rollback.
      self._run.finish()
    identity = self._load() or {'id': uuid.uuid4().hex[:8]}
    self._store(identity)
    if self._journal:
      for path in self._directory.glob(f'offline-run-*-{identity["id"]}'):
        shutil.rmtree(path)
    self._run = self._wandb.init(
      project=self._project,
      entity=self._entity or None,
      name=self._workdir.absolute().name,
      id=identity['id'],
      dir=str(self._workdir.absolute()),
      mode=self._mode,
      config=dict(hparams),
      resume='allow',
      reinit='create_new',  # The caller may have a run of its own.
      settings=self._wandb.Settings(
        silent=True,
        console='off',  # log.txt has the output.
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
      ),
    )
    for record in self._journal.keep(step) if self._journal else ():
      self._log(**record)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    values = {name: float(np.asarray(x)) for name, x in scalars.items()}
    self._record(step, 'scalars', values)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._record(step, 'texts', texts)

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    paths = self._save_images(self._images, step, images)
    self._record(step, 'images', paths)

  def close(self) -> None:
    if not self._run:
      return
    result = self._result()
    self._run.summary.update(result)
    is_well = result.get('status') in ('done', 'interrupted', 'running')
    self._run.finish(exit_code=0 if is_well else 1)

  def _record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    if self._journal:
      self._journal.add({'step': step, 'kind': kind, 'values': values})
    self._log(step, kind, values)

  def _log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
    convert = {
      # The journal has null for NaN and infinities.
      'scalars': lambda x: float('nan') if x is None else x,
      'texts': lambda x: self._wandb.Html(f'<pre>{html.escape(x)}</pre>'),
      'images': lambda paths: [
        self._wandb.Image(str(self._images / path)) for path in paths
      ],
    }[kind]
    self._run.log({k: convert(x) for k, x in values.items()}, step=step)
