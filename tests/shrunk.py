"""The main job and its tests, shrunk to seconds."""

from collections.abc import Iterable
import pathlib
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# base.py, shrunk to seconds: every part is there.
TINY = {
  'num_train_steps': 12,
  'batch_size': 4,
  'block_size': 16,
  'eval_interval': 4,
  'eval_iters': 2,
  'log_interval': 2,
  'model.d_model': 16,
  'model.num_layers': 2,
  'model.num_heads': 2,
  'moe.d_ff': 32,
  'sample.every_steps': 5,
  'sample.num_tokens': 20,
}

# All that a transformer may have in place of what base.py's has.
MODERN = {
  'model.norm': 'RMSNorm',
  'model.position': 'rope',
  'model.conv_width': 3,
  'model.max_ngram': 3,
  'model.ngram_rows': 300,  # Fewer than 3-grams.
  'model.num_kv_heads': 1,
  'model.qk_norm': True,
  'model.bias': False,
  'model.tie_embeddings': True,
  'model.logit_softcap': 20.0,
  'moe.first_dense_layers': 1,
}


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
  """Returns parameters of a test, of which all but `quick` are slow."""
  return [
    value if value in quick else pytest.param(value, marks=pytest.mark.slow)
    for value in values
  ]
