"""python -m benchmarks.workers.peak CONFIG KEY=VALUE ...

Trains for a few steps as nanomoe.main does, and prints as JSON: the bytes of
the compiled step by XLA's analysis, and the peak resident set size.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

from nanomoe import experiment
from nanomoe.config import overrides
from trainers.callbacks.result import peak_memory_bytes


def main() -> None:
  path, *words = sys.argv[1:]
  changes = [
    (key, value) for key, _, value in (w.partition('=') for w in words)
  ]
  config = overrides.apply(overrides.load_file(path), changes)
  with tempfile.TemporaryDirectory() as directory:
    trainer = experiment.build(config, pathlib.Path(directory))
    trainer.fit()
  update: Any = trainer._step_runner._update
  analysis = update.result().memory_analysis()
  print()
  print(
    json.dumps(
      {
        'arguments': analysis.argument_size_in_bytes,
        'temporaries': analysis.temp_size_in_bytes,
        'peak': peak_memory_bytes(),
        'status': trainer.status,
      }
    )
  )


if __name__ == '__main__':
  main()
