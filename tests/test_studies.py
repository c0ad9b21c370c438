"""Studies: their runs are what they say, and figures are those of the runs."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import (
  ablation,
  config_runs,
  precision_curves,
  results,
  routing_study,
  sweep,
)
from benchmarks.sweep import Run
from nanomoe import experiment
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema
from nanomoe.model import parameters as parameters_lib
from tests.shrunk import TINY, mostly_slow


def test_the_words_of_a_run_are_its_config(tmp_path):
  changes = {'moe.top_k': 1, 'moe.router.type': 'Softmax', 'data.path': ''}
  run = Run('configs/quick.py', changes, seed=7)
  words = run.job('a', tmp_path).words(tmp_path)
  rest, overrides = config_lib.split_arguments(words[2:])
  assert rest[1:] == [
    '-q',
    '--config=configs/quick.py',
    f'--workdir={tmp_path}',
  ]
  file = config_lib.load_file('configs/quick.py')
  config = config_lib.apply(file, overrides)
  own = {**changes, 'seed': 7}
  flat = dict(schema.flatten(config.to_dict()))
  assert {key: flat[key] for key in own} == own
  assert run.load().to_dict() == {**config.to_dict(), 'seed': 0}


def test_figures_of_a_run_are_those_it_logged(tmp_path):
  metrics = [
    {'step': 2, 'train/loss': 5.0, 'train/cross_entropy': 4.0},
    {'step': 4, 'train/loss': 4.0, 'train/cross_entropy': 3.0},
    {'step': 4, 'val/cross_entropy': 3.5, 'val/bits_per_char': 5.0},
    {'step': 6, 'val/cross_entropy': 2.5, 'val/bits_per_char': 4.0},
  ]
  changes = {'moe.router.type': 'ExpertChoice', 'data.path': tmp_path / 'text'}
  run = Run('configs/base.py', {**TINY, **changes})
  steps = {'step': TINY['num_train_steps'], 'vocab_size': 5}
  result = {**dict.fromkeys(results._KEPT, 1), **steps}
  for name, status in (('done', 'done'), ('half', 'interrupted')):
    directory = tmp_path / name
    directory.mkdir()
    config = json.dumps(run.job(name, tmp_path).load().to_dict())
    (directory / 'config.json').write_text(config)
    (directory / 'metrics.jsonl').write_text(
      '\n'.join(map(json.dumps, metrics))
    )
    (directory / 'result.json').write_text(
      json.dumps({**result, 'status': status})
    )
  runs = {'done': run, 'half': run, 'not begun': run}
  figures = sweep.gather(runs, tmp_path)
  assert list(figures) == ['done']
  got = figures['done']
  assert [list(row.values()) for row in got['rows']] == [
    [4, 3.0, 3.5, 5.0],
    [6, 3.0, 2.5, 4.0],
  ]
  assert got['last'] == {'val/cross_entropy': 2.5, 'val/bits_per_char': 4.0}
  assert got['is_causal'] is False
  assert got['changes']['data.path'] == 'text'
  assert got['gflop'] > 0
  assert json.loads(json.dumps(figures)) == figures


def parameters(config, **model):
  config.model.update(model)
  task = experiment.build_task(experiment.resolve_auto(config), 65)
  batch = {'inputs': jnp.zeros((1, config.block_size), jnp.int32)}
  params, _ = jax.eval_shape(task.init, jax.random.key(0), batch)
  return parameters_lib.count(params, config.moe.top_k)


@pytest.mark.parametrize(
  'name', mostly_slow(routing_study.VARIANTS, *list(routing_study.VARIANTS)[:2])
)
def test_a_variant_of_routing_has_the_active_parameters_of_all(name):
  """And all have as many in all, but for what routers and dense layers are."""
  counted, dense, wide = (
    parameters(routing_study.RUNS[f'{n}-0'].load(), num_layers=1)
    for n in (name, 'dense', 'dense_total')
  )
  total = wide['num_params']
  if name not in ('dense', 'dense_total'):
    assert counted['num_params'] == pytest.approx(total, rel=0.02)
  if name != 'dense_total':
    assert counted['num_active_params'] == pytest.approx(
      dense['num_active_params'], rel=0.03
    )


def test_runs_of_a_study_differ_in_what_they_are_named_after():
  seen = {}
  for study in (ablation, routing_study, precision_curves):
    for name, run in study.RUNS.items():
      assert name.rpartition('-')[2] == str(run.seed)
      key = json.dumps([run.config, run.changes, run.seed], sort_keys=True)
      assert seen.setdefault((study, key), name) == name


@pytest.mark.parametrize(
  'name', mostly_slow(config_runs.CONFIGS, config_runs.CONFIGS[0])
)
def test_a_config_uses_for_a_token_about_what_base_does(name):
  counted = parameters(config_runs.RUNS[name].load())
  # 4 layers of attention, two experts of 512 and a router of 4, by hand.
  attention = 4 * (128 * 128 + 128)
  experts = 2 * (2 * 128 * 512 + 512 + 128) + 4 * 128
  layers = 4 * (attention + experts)
  assert counted['num_active_params'] == pytest.approx(layers, rel=0.1)
