"""Reads what a tracker has of a run, with its own package, as JSON.

python tests/reference/read_trackers.py WORKDIR wandb|mlflow

It runs in an environment with wandb and mlflow.
"""

from collections.abc import Iterator
import json
import os
import pathlib
import struct
import sys


def records_of(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the records of a log in LevelDB's format, behind 7 bytes of W&B."""
  data, position, parts = path.read_bytes(), 7, []
  while position + 7 <= len(data):
    rest = 32768 - position % 32768
    if rest < 7:  # A block ends with padding.
      position += rest
      continue
    size, kind = struct.unpack_from('<HB', data, position + 4)
    parts.append(data[position + 7 : position + 7 + size])
    position += 7 + size
    if kind in (1, 4):  # A whole record, or the last part of one.
      yield b''.join(parts)
      parts = []


def of_wandb(workdir: pathlib.Path) -> dict:
  from wandb.proto import wandb_internal_pb2  # noqa: PLC0415

  (directory,) = (workdir / 'wandb').glob('offline-run-*')
  found: dict = {'history': {}, 'config': {}, 'summary': {}, 'exit': None}
  (file,) = directory.glob('*.wandb')
  for raw in records_of(file):
    record = wandb_internal_pb2.Record.FromString(raw)
    kind = record.WhichOneof('record_type')
    if kind == 'history':
      items = {
        item.key or '.'.join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
      }
      found['history'].setdefault(str(items['_step']), []).append(items)
    elif kind == 'run':
      found['id'] = record.run.run_id
      for item in record.run.config.update:
        key = item.key or '.'.join(item.nested_key)
        found['config'][key] = json.loads(item.value_json)
    elif kind == 'summary':
      for item in record.summary.update:
        key = item.key or '.'.join(item.nested_key)
        found['summary'][key] = json.loads(item.value_json)
    elif kind == 'exit':
      found['exit'] = record.exit.exit_code
  media = directory / 'files' / 'media'
  found['media'] = sorted(p.suffix for p in media.rglob('*') if p.is_file())
  return found


def of_mlflow(workdir: pathlib.Path) -> dict:
  os.environ['MLFLOW_ALLOW_FILE_STORE'] = 'true'
  from mlflow import MlflowClient  # noqa: PLC0415

  identity = json.loads((workdir / 'mlflow.json').read_text())
  client = MlflowClient(pathlib.Path(identity['store']).as_uri())
  experiments = client.search_experiments()
  (experiment,) = [e for e in experiments if e.name != 'Default']
  (run,) = client.search_runs([experiment.experiment_id])
  history = {
    name: [
      (metric.step, metric.value)
      for metric in client.get_metric_history(run.info.run_id, name)
    ]
    for name in run.data.metrics
  }

  def files(path=None):
    for file in client.list_artifacts(run.info.run_id, path):
      if file.is_dir:
        yield from files(file.path)
      else:
        yield file.path

  return {
    'id': run.info.run_id,
    'status': run.info.status,
    'params': run.data.params,
    'tags': run.data.tags,
    'history': history,
    'files': sorted(files()),
  }


if __name__ == '__main__':
  read = {'wandb': of_wandb, 'mlflow': of_mlflow}[sys.argv[2]]
  print(json.dumps(read(pathlib.Path(sys.argv[1]))))
