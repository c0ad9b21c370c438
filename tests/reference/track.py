"""Writes metrics to a tracker as a run does, up to a kill or to the end.

python tests/reference/track.py WORKDIR TYPE START STOP FACTOR END

It runs in an environment with wandb and mlflow. Training starts after step
START with the learning rate FACTOR. Scalars of step i are i * FACTOR. END is
the status of the run, or 'kill'.
"""

import json
import os
import pathlib
import signal
import sys

import numpy as np

import nanomoe  # noqa: F401 (It keeps CLU from importing TensorFlow.)
from trainers.writers import mlflow_run, wandb_run, writers
from trainers.writers.run_writer import TensorBoardLayout

TYPES = {'Wandb': wandb_run.Wandb, 'MLflow': mlflow_run.MLflow}


def main(workdir: str, kind: str, start: str, stop: str, factor: str, end: str):
  path = pathlib.Path(workdir)
  path.mkdir(exist_ok=True)
  # The machine may be busy with other tests.
  writers.PATIENCE_SECONDS = writers.PATIENCE_AT_ENDS_SECONDS = 600
  # A store whose path is relative to the current directory of the first start.
  arguments = {'directory': 'mlruns'} if kind == 'MLflow' else {}
  tracker = TYPES[kind](path, **arguments)
  hparams = {'optimizer.learning_rate': float(factor), 'seed': 0}
  run = writers.Writers(path, [tracker], TensorBoardLayout(hparams=hparams))
  run.start(int(start), 0)
  for step in range(int(start) + 1, int(stop) + 1):
    loss = step * float(factor)
    run.write(step, {'train/loss': loss, 'train/load': [loss, 1.0]})
    if step % 2 == 0:
      image = np.full((2, 3, 3), step, np.uint8)
      run.clu.write_images(step, {'loads': image})
      run.clu.write_texts(step, {'sample': f'<{step}>'})
      run.write(step, {'val/loss': -loss, 'val/accuracy@5': loss})
  if end == 'kill':
    os.kill(os.getpid(), signal.SIGKILL)
  result = {'status': end, 'step': int(stop), 'best_val_loss': 0.5}
  (path / 'result.json').write_text(json.dumps(result))
  run.close(end)


if __name__ == '__main__':
  main(*sys.argv[1:])
