"""Metric writer of MLflow, into a store of files."""

from collections.abc import Mapping
import importlib
import os
import pathlib
import re
import shutil
import time
from typing import Any

import numpy as np

from trainers.files import write_atomically
from trainers.writers.tracker import Tracker


class MLflow(Tracker):
  """Metric writer of MLflow, into a store of files on this machine.

  `mlflow ui --backend-store-uri DIRECTORY` shows the store. A resumed run
  continues the tracker's run, and removes what the store has of later steps.

  Args:
    workdir: Directory of the run.
    directory: Directory of the store, which several runs may share; '' selects
      `<workdir>/mlruns`.
    experiment: Name of the experiment.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    directory: str = '',
    experiment: str = 'nanomoe',
  ):
    super().__init__(workdir, 'mlflow')
    # MLflow 3 refuses stores of files without it.
    os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')
    try:
      self._mlflow: Any = importlib.import_module('mlflow')
    except ImportError as error:
      raise ValueError(
        "mlflow is not installed; run pip install 'nanomoe[mlflow]'"
      ) from error
    if '://' in directory:
      raise ValueError(f'directory={directory!r}: it must be a path, not a URI')
    path = pathlib.Path(directory).expanduser() if directory else None
    self._store_directory = (path or workdir / 'mlruns').absolute()
    self._experiment = experiment
    self._client: Any = None
    self._run_id = ''
    self._files = workdir  # Directory of the run in the store.

  def start(self, step: int, hparams: Mapping[str, Any]) -> None:
    # A file that kill -9 has left incomplete would fail every call of MLflow.
    found = self._find_run()
    self._client = self._mlflow.MlflowClient(self._store_directory.as_uri())
    if found:
      self._files = found
      self._supersede(step)
    else:
      self._files = self._make_run()
    self._run_id = self._files.name
    self._client.update_run(self._run_id, status='RUNNING')
    entities = self._mlflow.entities
    params = [entities.Param(name, str(x)) for name, x in hparams.items()]
    for i in range(0, len(params), 100):  # The limit of a batch.
      self._client.log_batch(self._run_id, params=params[i : i + 100])

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    self._log(step, {k: float(np.asarray(x)) for k, x in scalars.items()})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
      path = self._files / 'artifacts' / 'texts' / name / f'{step:08d}.txt'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text, encoding='utf-8')

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    self._save_images(self._files / 'artifacts' / 'images', step, images)

  def close(self) -> None:
    if not self._run_id:
      return
    result = self._result()
    numbers = {
      f'result/{name}': float(value)
      for name, value in result.items()
      if not isinstance(value, str)
    }
    self._log(int(result.get('step', 0)), numbers)
    for name, value in result.items():
      if isinstance(value, str):
        self._client.set_tag(self._run_id, f'result.{name}', value[:5000])
    status = {'done': 'FINISHED', 'interrupted': 'KILLED'}
    self._client.set_terminated(
      self._run_id, status.get(result.get('status', ''), 'FAILED')
    )

  def _find_run(self) -> pathlib.Path | None:
    """Returns the directory of the run of an earlier start, or None.

    A relative store is that of the start which made the run, whatever the
    current directory is now.
    """
    if not (identity := self._load()):
      return None
    # Older versions did not record the store.
    recorded = pathlib.Path(identity.get('store', self._store_directory))
    for store in (recorded, self._store_directory):
      for path in store.glob(f'*/{identity["run_id"]}/meta.yaml'):
        self._store_directory = store
        return path.parent
    return None

  def _make_run(self) -> pathlib.Path:
    """Makes a run, and returns its directory."""
    found = self._client.get_experiment_by_name(self._experiment)
    experiment = (
      found.experiment_id
      if found
      else self._client.create_experiment(self._experiment)
    )
    name = self._workdir.absolute().name
    run = self._client.create_run(experiment, run_name=name)
    store = str(self._store_directory)
    self._store({'run_id': run.info.run_id, 'store': store})
    return self._store_directory / experiment / run.info.run_id

  def _supersede(self, step: int) -> None:
    """Removes metrics and artifacts after `step`, and the last result.

    MLflow has no call that deletes a value of a metric, or changes a parameter.
    """
    shutil.rmtree(self._files / 'metrics' / 'result', ignore_errors=True)
    for path in (self._files / 'metrics').rglob('*'):
      if path.is_file():
        lines = path.read_text(encoding='utf-8').split('\n')
        # A line is `time value step`. kill -9 can leave a part of the last one.
        kept = [line for line in lines[:-1] if int(line.split()[2]) <= step]
        write_atomically(path, ''.join(f'{line}\n' for line in kept))
        if not kept:
          path.unlink()
    for path in (self._files / 'params').rglob('*'):
      if path.is_file():
        path.unlink()
    for path in (self._files / 'artifacts').rglob('*.*'):
      number = re.match(r'\d{8,}', path.name)
      if number and int(number[0]) > step:
        path.unlink()

  def _log(self, step: int, values: Mapping[str, float]) -> None:
    entities, now = self._mlflow.entities, int(time.time() * 1000)
    # MLflow refuses other characters, such as the "@" of "accuracy@5".
    metrics = [
      entities.Metric(re.sub(r'[^\w\-. :/]', '_', name), value, now, step)
      for name, value in values.items()
    ]
    self._client.log_batch(self._run_id, metrics=metrics)
