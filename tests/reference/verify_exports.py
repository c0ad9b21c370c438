"""Exports models of random weights and compares each with transformers.

python verify_exports.py OUT

Prints a line of JSON for each case of `tests.exported.CASES`. It runs in an
environment with this package's requirements, torch and transformers.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from nanomoe.portable import classes, model, verify
from tests import exported


def main(out: str) -> None:
  text = exported.TEXT
  for name in exported.CASES:
    directory = pathlib.Path(out) / name
    case = exported.make(name, directory)
    read = model.read(
      directory,
      case.config,
      jax.eval_shape(lambda case=case: case.trained.params),
      case.trained.bias is not None,
    )
    tokens = case.tokenizer.encode(text)
    reference = verify.reference(
      case.config, case.tokenizer.vocab_size, read, tokens
    )
    verify.same_weights(case.trained, read, np.dtype(np.float32))
    verify.same_logits(case.trained, reference)
    try:
      found = verify.same_as_transformers(directory, reference, text, tokens)
    except Exception as error:
      found = {'error': repr(error)}
    found['std'] = float(np.std(reference.logits(reference.windows(2))))
    hf = classes.find(case.config)
    print(json.dumps({'case': name, 'class': hf.name, **found}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
