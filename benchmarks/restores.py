"""python -m benchmarks.restores

Saves a small run on each of six meshes of virtual CPU devices and resumes it on
each of them: fingerprints of all arrays, the next batch, and the losses of
three further steps against those of one device. Writes
benchmarks/results/restores.json.
"""

from collections.abc import Iterable
import itertools
import json
import pathlib
import shutil
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np

from benchmarks import results
from configs import base
from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.run import cli
from trainers.callbacks import Callback
from trainers.checkpoint import arrays, reader

_FLAGS = flags.FlagValues()

NUM_DEVICES = 8
NUM_STEPS, NUM_MORE = 2, 3
MESHES: dict[str, dict[str, int]] = {
  'one device': {},
  'data 8': {'data': 8},
  'fsdp 8': {'fsdp': 8},
  'expert 8': {'expert': 8},
  'tensor 4': {'tensor': 4},
  'data 2 x fsdp 2 x expert 2': {'data': 2, 'fsdp': 2, 'expert': 2},
}
SMALL = {
  'batch_size': 8,
  'block_size': 16,
  'eval_interval': NUM_STEPS,
  'eval_iters': 1,
  'log_interval': 1,
  'precision': 'float32',
  'model.d_model': 32,
  'model.num_layers': 1,
  'model.num_heads': 4,
  'moe.num_experts': 8,
  'moe.d_ff': 64,
  'moe.router.type': 'Sigmoid',
  'optimizer.ema_decay': 0.9,
  'sample.num_tokens': 0,
}


class Start(Callback):
  """Callback that keeps fingerprints and the next batch of a start."""

  def on_fit_start(self, loop):
    state = arrays.flatten_by_name({'state': loop.state})
    self.fingerprints = arrays.fingerprints(state)
    self.batch_index = int(loop.state.batch_index)


def train(
  workdir: pathlib.Path, text: pathlib.Path, sizes: dict[str, int], steps: int
) -> Start:
  """Trains or resumes a run on a mesh; returns what its start found."""
  values = {**SMALL, 'num_train_steps': steps, 'data.path': str(text)}
  values |= {f'mesh.{axis}': size for axis, size in sizes.items()}
  config = config_lib.apply(
    base.get_config(), [(key, str(value)) for key, value in values.items()]
  )
  workdir.mkdir(exist_ok=True)
  trainer = experiment.build(config, workdir)
  start = Start()
  trainer.callbacks.append(start)
  if trainer.fit() != 'done':
    raise RuntimeError(f'{workdir}: {trainer.status}')
  return start


def losses(workdir: pathlib.Path) -> list[float]:
  """Returns the training losses of a run, by step."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  logged = [line for line in map(json.loads, lines) if 'train/loss' in line]
  return [line['train/loss'] for line in logged]


def measure(
  directory: pathlib.Path, pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
  """Returns a row for each pair of meshes.

  Args:
    directory: Directory of the runs.
    pairs: Keys of `MESHES`: of the saved run, and of the resumed one.
  """
  text = directory / 'text.txt'
  rng = np.random.default_rng(0)
  text.write_text(''.join(rng.choice(list('abcdefghij \n'), 5000)))
  whole = directory / 'whole'
  train(whole, text, {}, NUM_STEPS + NUM_MORE)
  expected = np.array(losses(whole))
  pairs = list(pairs)
  for name in dict.fromkeys(saved for saved, _ in pairs):
    train(directory / f'saved {name}', text, MESHES[name], NUM_STEPS)
  rows = []
  for saved, resumed in pairs:
    workdir = directory / 'resumed'
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(directory / f'saved {saved}', workdir)
    meta = reader.read_meta(workdir / 'checkpoints', NUM_STEPS)
    start = train(workdir, text, MESHES[resumed], NUM_STEPS + NUM_MORE)
    content = {
      name: value
      for name, value in meta['content'].items()
      if name.startswith('state.')
    }
    found = np.array(losses(workdir))
    rows.append(
      {
        'saved': saved,
        'resumed': resumed,
        'same_fingerprints': start.fingerprints == content,
        'same_batch': start.batch_index == NUM_STEPS,
        'loss': float(np.abs(found / expected - 1).max()),
      }
    )
    print(rows[-1], flush=True)
  return rows


def table(figures: dict[str, Any]) -> str:
  """Returns Markdown: the largest difference by saved and resumed mesh."""
  lines = [
    f'| saved on | {" | ".join(MESHES)} |',
    f'|---|{"---:|" * len(MESHES)}',
  ]
  found = {(row['saved'], row['resumed']): row for row in figures['rows']}
  for saved in MESHES:
    cells = []
    for resumed in MESHES:
      row = found[saved, resumed]
      is_exact = row['same_fingerprints'] and row['same_batch']
      cells.append(f'{row["loss"]:.0e}' if is_exact else 'DIFFERENT')
    lines.append(f'| {saved} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main(_) -> int:
  with tempfile.TemporaryDirectory() as directory:
    rows = measure(pathlib.Path(directory), itertools.product(MESHES, repeat=2))
  results.write('restores', {'num_more': NUM_MORE, 'rows': rows})
  return 0


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', NUM_DEVICES)
  cli.run(main, lambda argv: cli.parse_flags(argv, _FLAGS, __doc__ or ''))
