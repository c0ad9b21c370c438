"""Who may import whom, what the configs hold, and that each key matters."""

import ast
import importlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import variant
from configs import base
from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema
from tests.shrunk import ROOT, TINY

CONFIGS = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('*.py')
  if path.stem != '__init__'
)

# Trained in the default tests: to compile one takes ten seconds.
FAST = ('base',)

# package: what none of its modules may import.
FORBIDDEN = {
  'trainers': ('nanomoe', 'configs', 'flax.linen', 'benchmarks', 'tests'),
  'nanomoe': ('configs', 'benchmarks', 'tests'),
  'configs': ('nanomoe', 'trainers', 'jax', 'flax', 'optax', 'numpy'),
}


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('package', FORBIDDEN)
def test_imports_go_one_way(package):
  paths = list((ROOT / package).rglob('*.py'))
  assert paths
  found = [
    f'{path.relative_to(ROOT)} imports {name}'
    for path in paths
    for name in _imports(path)
    for forbidden in FORBIDDEN[package]
    if name == forbidden or name.startswith(f'{forbidden}.')
  ]
  assert not found


def test_every_package_is_listed_for_installation():
  setup = (ROOT / 'setup.cfg').read_text()
  for package in FORBIDDEN:
    for path in (ROOT / package).rglob('__init__.py'):
      name = '.'.join(path.parent.relative_to(ROOT).parts)
      assert f'\n  {name}\n' in setup


def test_main_is_light_and_answers_before_jax():
  code = (
    'import sys, nanomoe.main\n'
    'print([m for m in ("jax", "flax", "orbax", "rich") if m in sys.modules])'
  )
  out = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert out.stdout.strip() == '[]'


def _shrunk(name, corpus):
  module = importlib.import_module(f'configs.{name}')
  changes = {**TINY, 'num_train_steps': 2, 'data.path': corpus}
  return config_lib.apply(
    module.get_config(), [(k, str(v)) for k, v in changes.items()]
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_built_and_its_step_traced(name, corpus, tmp_path):
  """Its file says what it is for, and how."""
  module = importlib.import_module(f'configs.{name}')
  command = f'python -m nanomoe.main --config=configs/{name}.py'
  assert command in module.__doc__
  config = _shrunk(name, corpus)
  experiment.build(config, tmp_path)
  assert variant.flops(config, 20) > 0
  whole = config_lib.apply(module.get_config(), [])
  experiment.build_task(experiment.resolve_auto(whole), 65)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in CONFIGS
  ],
)
def test_config_takes_a_step(name, corpus, tmp_path):
  """Each config, shrunk, trains."""
  trainer = experiment.build(_shrunk(name, corpus), tmp_path)
  assert trainer.fit() == 'done'
  assert trainer.step == 2


@pytest.mark.parametrize('module', ['nanomoe.experiment', 'trainers.trainer'])
def test_a_module_can_be_imported_first(module, run):
  process = run([sys.executable, '-c', f'import {module}'])
  assert process.returncode == 0, process.stderr


# A second value for every key of base.py, and what must then differ.
OTHER = {
  'seed': 1,
  'num_train_steps': 3,
  'batch_size': 3,
  'block_size': 8,
  'eval_interval': 1,
  'eval_iters': 1,
  'log_interval': 1,
  'confidence_weight': 0.5,
  'precision': 'float32',
  'data.path': 'OTHER',
  'data.tokenizer.type': 'Bytes',
  'model.d_model': 32,
  'model.num_layers': 1,
  'model.num_heads': 4,
  'model.dropout_rate': 0.5,
  'model.norm': 'RMSNorm',
  'model.position': 'rope',
  'model.conv_width': 2,
  'model.max_ngram': 2,
  'model.ngram_rows': 50,
  'model.num_kv_heads': 1,
  'model.qk_norm': True,
  'model.bias': False,
  'model.zero_outputs': True,
  'model.tie_embeddings': True,
  'model.logit_softcap': 0.5,
  'moe.num_experts': 3,
  'moe.top_k': 1,
  'moe.d_ff': 16,
  'moe.first_dense_layers': 1,
  'moe.every': 2,
  'moe.activation': 'relu2',
  'moe.num_shared': 1,
  'moe.dense_d_ff': 16,
  'moe.balance': 'all_choices',
  'moe.aux_weight': 0.5,
  'moe.z_weight': 0.5,
  'moe.entropy_weight': 0.5,
  'optimizer.learning_rate': 1e-2,
  'optimizer.weight_decay': 0.5,
  'optimizer.beta1': 0.5,
  'optimizer.beta2': 0.5,
  'optimizer.schedule.type': 'linear',
  'optimizer.clip_norm': 0.01,
  'optimizer.decay_mask': 'matrices',
  'optimizer.ema_decay': 0.9,
  'checkpoint.keep_latest': 4,
  'callbacks.routing_alarm.max_vio': 0.0,
  'sample.num_tokens': 7,
  'sample.temperature': 0.1,
}
# Keys that matter only beside others.
BESIDE = {
  'moe.dense_d_ff': {'moe.every': 2},
  'model.ngram_rows': {'model.max_ngram': 2},
}
# Shown elsewhere: what a fallback is for, that dispatches agree and which of
# them knows a capacity, what plug-ins and callbacks do, what remat saves, which
# weights are evaluated, what a spike is.
ELSEWHERE = {
  'init_from',
  'eval_weights',
  'model.remat',
  'data.fallback',
  'data.dataset.type',
  'optimizer.type',
  'moe.dispatch',
  'moe.eval_dispatch',
  'moe.capacity_factor',
  'model.attention.type',
  'moe.router.type',
  'callbacks.early_stopping.type',
  'callbacks.early_stopping.patience',
  'callbacks.non_finite.type',
  'callbacks.non_finite.patience',
  'callbacks.non_finite.max_rollbacks',
  'optimizer.spike_factor',
  'optimizer.spike_window',
  'callbacks.profile.type',
  'callbacks.profile.num_steps',
  'callbacks.routing_alarm.type',
  'callbacks.routing_alarm.action',
  'callbacks.routing_alarm.dead_steps',
  'callbacks.routing_alarm.factor',
  'callbacks.routing_alarm.min_weight',
  'callbacks.routing_alarm.max_weight',
  'sample.every_steps',
}


def test_the_table_names_every_key_of_base():
  keys = {key for key, _ in schema.flatten(base.get_config().to_dict())}
  assert keys == {*OTHER, *ELSEWHERE}
  assert keys >= set(schema.FIELDS)


def _left_behind(changes, workdir):
  """What a run leaves that does not depend on the clock."""
  # Four checkpoints: by default the last two are kept, and the best.
  start = {**TINY, 'precision': 'bfloat16', 'num_train_steps': 8}
  start |= {'eval_interval': 2, 'moe.balance': 'switch_sum'}
  overrides = [(k, str(v)) for k, v in (start | changes).items()]
  config = config_lib.apply(base.get_config(), overrides)
  trainer = experiment.build(config, workdir)
  trainer.fit()
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  metrics = [
    {k: v for k, v in json.loads(line).items() if 'sec' not in k}
    for line in lines
  ]
  steps = sorted(p.name for p in (workdir / 'checkpoints').iterdir())
  return (
    json.dumps(metrics),
    steps,
    (workdir / 'sample.txt').read_text(),
    [np.asarray(x).tobytes() for x in jax.tree.leaves(trainer.state)],
  )


@pytest.fixture(scope='session')
def reference(corpus, tmp_path_factory):
  """What base.py leaves behind, run twice."""
  directory = tmp_path_factory.mktemp('reference')
  left = _left_behind({'data.path': corpus}, directory / 'once')
  assert left == _left_behind({'data.path': corpus}, directory / 'again')
  return left


@pytest.mark.slow
@pytest.mark.parametrize('key', OTHER)
def test_every_key_changes_something(key, reference, corpus, tmp_path):
  changes = {'data.path': corpus, key: OTHER[key]}
  if key == 'data.path':
    changes[key] = tmp_path / 'other.txt'
    changes[key].write_text(corpus.read_text()[::-1])
  if key in BESIDE:
    others = {'data.path': corpus, **BESIDE[key]}
    reference = _left_behind(others, tmp_path / 'without')
    changes |= others
  assert _left_behind(changes, tmp_path / 'with') != reference
