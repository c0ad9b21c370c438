"""Who may import whom, what the configs hold, and that each key matters."""

import ast
import configparser
import fnmatch
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
from nanomoe.planning import program
from tests.shrunk import ROOT, TINY, mostly_slow
from trainers.mesh import make_mesh

CONFIGS = sorted(
  path.stem
  for path in (ROOT / 'configs').glob('*.py')
  if path.stem != '__init__'
)

# Package: the packages that none of its modules may import.
FORBIDDEN = {
  'trainers': ('nanomoe', 'configs', 'flax.linen', 'benchmarks', 'tests'),
  'nanomoe': ('configs', 'benchmarks', 'tests'),
  'configs': ('nanomoe', 'trainers', 'jax', 'flax', 'optax', 'numpy'),
}
# Room of nanomoe: the rooms that its modules may import, beside themselves.
# Modules of the folder itself are rooms of their own.
ARROWS = {
  'config': (),
  'ops': (),
  'run': ('config',),
  'data': ('run', 'config'),
  'moe': ('ops', 'config'),
  'model': ('moe', 'ops', 'config'),
  'schedules': (),
  'optimizers': ('schedules', 'model', 'config'),
  'sampling': ('model',),
  'task': ('model', 'moe', 'ops', 'config'),
  'planning': (
    *('task', 'optimizers', 'model', 'moe', 'ops', 'data', 'run', 'config'),
  ),
  'portable': ('task', 'sampling', 'model', 'data', 'run', 'config'),
  'comparison': ('planning', 'data', 'run', 'config'),
  'sweeps': ('data', 'run', 'config'),
  'inspection': ('task', 'model', 'moe', 'data', 'run', 'config'),
  'callbacks': ('task', 'sampling', 'model', 'moe', 'ops', 'data', 'run'),
}
# They may import every room; no room imports them.
DOORS = (
  *('__main__', 'console', 'main', 'launch', 'evaluate', 'generate', 'plan'),
  *('export', 'import_hf', 'compare', 'sweep', 'routing', 'api', 'session'),
  'experiment',
)
MAX_ENTRIES = 20  # In a folder, beside the doors.


def _imports(path):
  """Yields the imports of a file, also those of functions and of types."""
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


def _room(module: str) -> str:
  """Returns the room of a module of nanomoe: its folder, or its own name."""
  return module.split('.')[1] if '.' in module else ''


def test_rooms_import_along_the_arrows():
  found = []
  for path in (ROOT / 'nanomoe').rglob('*.py'):
    own = _room(_module(path))
    if own in DOORS or not own:
      continue
    allowed = {own, '', *ARROWS[own]}
    found += [
      f'{path.relative_to(ROOT)} imports {name}'
      for name in _imports(path)
      if name.startswith('nanomoe.') and _room(name) not in allowed
    ]
  assert not found


def _module(path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _graph():
  """Returns {module: the modules that it imports by name}."""
  paths = {
    _module(path): path
    for package in ('nanomoe', 'trainers')
    for path in (ROOT / package).rglob('*.py')
  }
  graph = {}
  for module, path in paths.items():
    names = set(_imports(path)) & set(paths)
    # `from package import module` names both; it needs the module.
    packages = {n for n in names if any(o.startswith(f'{n}.') for o in names)}
    graph[module] = names - packages - {module}
  return graph


def _circle(graph):
  """Returns modules that import each other in a circle, or ()."""
  done = set()

  def visit(module, path):
    if module in path:
      return (*path[path.index(module) :], module)
    if module in done:
      return ()
    for other in sorted(graph[module]):
      if found := visit(other, (*path, module)):
        return found
    done.add(module)
    return ()

  return next((c for m in sorted(graph) if (c := visit(m, ()))), ())


def test_no_modules_import_each_other_in_a_circle():
  assert not _circle(_graph())


def test_a_circle_would_be_found():
  assert _circle({'a': {'b'}, 'b': {'c'}, 'c': {'b'}}) == ('b', 'c', 'b')
  assert not _circle({'a': {'b', 'c'}, 'b': {'c'}, 'c': set()})


def test_no_folder_is_crowded():
  for package in ('nanomoe', 'trainers', 'configs'):
    for folder in (ROOT / package, *(ROOT / package).rglob('*')):
      if not folder.is_dir() or '__pycache__' in folder.parts:
        continue
      entries = [
        path.name
        for path in folder.iterdir()
        if path.name not in ('__pycache__', '__init__.py', 'py.typed')
        and path.stem not in DOORS
      ]
      assert len(entries) <= MAX_ENTRIES, (folder, sorted(entries))


def test_every_package_is_listed_for_installation():
  """Every folder with modules is a package that setup.cfg finds."""
  options = configparser.ConfigParser()
  options.read(ROOT / 'setup.cfg')
  assert options['options']['packages'] == 'find:'
  include = options['options.packages.find']['include'].split()
  for package in FORBIDDEN:
    for path in (ROOT / package).rglob('*.py'):
      name = '.'.join(path.parent.relative_to(ROOT).parts)
      assert (path.parent / '__init__.py').exists(), name
      assert any(fnmatch.fnmatch(name, pattern) for pattern in include), name


@pytest.mark.parametrize('name', ['main', 'launch', 'plan', 'sweep'])
def test_a_command_is_light_and_answers_before_jax(name):
  code = (
    f'import sys, nanomoe.{name}\n'
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
  config = module.get_config()
  changes = {**TINY, 'num_train_steps': 2, 'data.path': corpus}
  # Fewer heads have fewer groups.
  changes['model.num_kv_heads'] = min(config.model.num_kv_heads, 1)
  return config_lib.apply(config, [(k, str(v)) for k, v in changes.items()])


@pytest.mark.parametrize('name', mostly_slow(CONFIGS, 'base', 'deepseek_nano'))
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


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['base', 'dense', 'shakespeare', 'deepseek_nano', 'gpu_1b']
)
def test_config_takes_a_step(name, corpus, tmp_path):
  """Configs whose parts differ train, shrunk; the steps of all are traced."""
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
  'model.vocab_rows': 64,
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
# them knows a capacity, what plug-ins and callbacks do, what remat and chunks
# save, that a scan is the unrolled model, which weights are evaluated, what a
# spike is, that meshes agree, that micro-batches equal their batch.
ELSEWHERE = {
  'accumulate_steps',
  'init_from',
  'upcycle.type',
  'eval_weights',
  'model.logits_chunk',
  'model.scan_layers',
  'model.remat',
  'data.fallback',
  'data.dataset.type',
  'optimizer.type',
  'moe.dispatch',
  'moe.eval_dispatch',
  'moe.capacity_factor',
  'moe.exchange',
  'mesh.data',
  'mesh.fsdp',
  'mesh.expert',
  'mesh.tensor',
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


def _changed(changes):
  # Four checkpoints: by default the last two are kept, and the best.
  start = {**TINY, 'precision': 'bfloat16', 'num_train_steps': 8}
  start |= {'eval_interval': 2, 'moe.balance': 'switch_sum'}
  overrides = [(k, str(v)) for k, v in (start | changes).items()]
  return config_lib.apply(base.get_config(), overrides)


def _program(changes):
  """The lowered training step, which needs no compilation."""
  config = experiment.resolve_auto(_changed(changes))
  mesh = make_mesh(config.mesh.to_dict())
  return program.lower(program.make(config, 20, mesh)).as_text()


def _left_behind(changes, workdir):
  """What a run leaves that does not depend on the clock."""
  trainer = experiment.build(_changed(changes), workdir)
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


@pytest.fixture(scope='session')
def step():
  """The training step of base.py, traced twice."""
  assert _program({}) == _program({})
  return _program({})


@pytest.mark.slow
@pytest.mark.parametrize('key', [key for key in OTHER if key not in BESIDE])
def test_every_key_changes_something(key, step, request, corpus, tmp_path):
  """The program of the step, or what a run leaves behind."""
  if _program({key: OTHER[key]}) != step:
    return
  changes = {'data.path': corpus, key: OTHER[key]}
  if key == 'data.path':
    changes[key] = tmp_path / 'other.txt'
    changes[key].write_text(corpus.read_text()[::-1])
  reference = request.getfixturevalue('reference')
  assert _left_behind(changes, tmp_path / 'with') != reference


@pytest.mark.slow
@pytest.mark.parametrize('key', BESIDE)
def test_a_key_changes_something_beside_others(key):
  assert _program({**BESIDE[key], key: OTHER[key]}) != _program(BESIDE[key])
