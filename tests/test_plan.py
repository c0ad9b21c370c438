"""nanomoe plan: sizes, work, traffic, the largest batch, and mistakes."""

import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.products import ideal
from nanomoe import experiment
from nanomoe import plan as plan_command
from nanomoe.planning import (
  collectives,
  estimate,
  hardware,
  products,
  program,
  report,
  vocabulary,
)
from tests.shrunk import ROOT, TINY, mostly_slow
from trainers.errors import UserError
from trainers.mesh import make_abstract_mesh, make_mesh

VOCAB_SIZE = 20
STATE = ('weights', 'optimizer', 'average', 'model_state')
TERMS = (*STATE, 'batch', 'gradients', 'logits', 'activations')


def _words(corpus, changes=None, *flags):
  values = {**TINY, 'data.path': str(corpus), **(changes or {})}
  return [
    '--config=configs/base.py',
    *(f'--config.{key}={value}' for key, value in values.items()),
    *flags,
  ]


@pytest.fixture(scope='module')
def planned(corpus):
  """The plan of a mesh of eight devices, as printed, and its standard error."""
  changes = {
    'batch_size': 16,
    'mesh.data': -1,
    'mesh.fsdp': 2,
    'mesh.expert': 2,
    'optimizer.ema_decay': 0.9,
    'model.num_layers': 1,
  }
  flags = '--devices=8', '--peak_flops=1e12', '--format=json'
  process = subprocess.run(
    [sys.executable, '-m', 'nanomoe.plan', *_words(corpus, changes, *flags)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert process.returncode == 0, process.stderr
  return json.loads(process.stdout)


@pytest.mark.slow
def test_a_plan_is_json_and_its_terms_sum_up(planned):
  assert planned['mesh'] == {'data': 2, 'fsdp': 2, 'expert': 2, 'tensor': 1}
  assert planned['vocab_size'] == VOCAB_SIZE
  memory = planned['memory']
  assert sum(memory[term] for term in TERMS) == pytest.approx(memory['total'])
  assert memory['weights'] == memory['gradients'] == memory['average']
  assert 0 < planned['active_flops_per_token'] <= planned['flops_per_token']
  kinds = planned['collectives']
  assert {'all-gather', 'all-reduce'} <= set(kinds) <= set(collectives.KINDS)
  assert all(x['received_bytes'] > 0 for x in kinds.values())


@pytest.mark.slow
def test_the_state_from_shapes_is_what_the_compiled_program_takes(planned):
  """The batch, the key and the metrics are the only other arguments."""
  of_batch = 3 * 4 * 16 * TINY['block_size'] // 8
  rest = planned['memory']['batch'] - of_batch
  assert 8 <= rest < 4000  # Metrics that are summed, such as loads.


@pytest.mark.slow
def test_the_time_is_that_of_active_products(planned):
  tokens = 16 * TINY['block_size']
  seconds = planned['active_flops_per_token'] * tokens / (0.4 * 1e12 * 8)
  assert planned['step_seconds'] == pytest.approx(seconds)
  assert planned['train_seconds'] == pytest.approx(12 * seconds)


@pytest.mark.slow
def test_the_text_has_every_term(planned):
  text = report.text(planned)
  for word in (*TERMS, 'total', 'all-gather', 'step', 'training'):
    assert f'  {word}' in text
  assert max(map(len, text.splitlines())) <= 100


def test_the_state_is_that_of_placed_arrays(tiny):
  config = experiment.resolve_auto(tiny({'optimizer.type': 'Adafactor'}))
  made = program.make(config, VOCAB_SIZE, make_mesh())
  assert sum(program.state_bytes(made).values()) == sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(made.state)
  )


def test_a_mesh_of_any_size_divides_the_state(tiny):
  config = experiment.resolve_auto(
    tiny({'batch_size': 4096, 'model.d_model': 4096, 'moe.num_experts': 64})
  )

  def weights(**sizes):
    made = program.make(config, 4096, make_abstract_mesh(sizes))
    return program.state_bytes(made)['weights']

  whole = weights()
  assert weights(data=4096) == whole
  # Biases, norms and routers are whole on each device.
  assert weights(fsdp=64) < whole / 40
  assert weights(fsdp=64, expert=64) < weights(fsdp=64)


PLAIN = {'model.bias': False, 'precision': 'float32'}
DENSE = {'moe.first_dense_layers': 2, 'moe.dense_d_ff': 24}


def _formula(config, **experts):
  """Returns the FLOPs of a step by hand.

  Attention by four blocks of rows spares 3 of 8 scores. The gradient of a
  normalization has two products with a vector.
  """
  sizes = dict(
    num_tokens=config.batch_size * config.block_size,
    block_size=config.block_size,
    vocab_size=VOCAB_SIZE,
    d_model=config.model.d_model,
    num_layers=config.model.num_layers,
  )
  tokens, time, _, width, depth = sizes.values()
  spared = 12 * depth * time * width * 3 / 8
  norms = 4 * width * (2 * depth + 1)
  return ideal(**sizes, **experts) + tokens * (norms - spared)


@pytest.mark.parametrize('sizes', mostly_slow([{}, {'data': 4}], {}))
def test_the_work_of_a_dense_model_is_the_formula(tiny, sizes):
  config = experiment.resolve_auto(tiny({**PLAIN, **DENSE}))
  expected = _formula(config, num_experts=0, experts_per_token=1, d_ff=24)
  made = program.make(config, VOCAB_SIZE, make_abstract_mesh(sizes))
  assert program.flops(made) == expected
  tokens = config.batch_size * config.block_size
  of_token = program.active_flops_per_token(
    config, VOCAB_SIZE, make_abstract_mesh({})
  )
  assert of_token == expected / tokens


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'moe.dispatch': 'dense', 'precision': 'bfloat16'},
    {'model.remat': 'block', 'accumulate_steps': 2, 'model.logits_chunk': 4},
  ],
)
def test_the_work_of_active_experts_depends_on_the_model_alone(tiny, changes):
  config = experiment.resolve_auto(tiny({**PLAIN, **changes}))
  expected = _formula(config, num_experts=4, experts_per_token=2, d_ff=32)
  of_token = program.active_flops_per_token(
    config, VOCAB_SIZE, make_abstract_mesh({})
  )
  # The dense dispatch has a small product of its own, of K * K numbers.
  tokens = config.batch_size * config.block_size
  assert of_token == pytest.approx(expected / tokens, rel=1e-3)


def test_a_product_of_each_device_counts_for_all():
  mesh = make_abstract_mesh({'data': 3, 'expert': 4})
  of_parts = jax.shard_map(
    lambda x: x @ x.T,
    mesh=mesh,
    in_specs=jax.P('expert'),
    out_specs=jax.P('expert'),
  )
  x = jax.ShapeDtypeStruct((8, 5), jnp.float32)
  assert products.count(of_parts, x) == 12 * 2 * (2 * 5 * 2)


@pytest.mark.slow
def test_the_work_of_a_mesh_is_that_of_all_devices(tiny):
  """Each device dispatches its own tokens, and pads each expert's rows."""
  config = experiment.resolve_auto(
    tiny({'batch_size': 32, 'block_size': 64, 'model.num_layers': 1})
  )
  one, eight = (
    program.flops(program.make(config, VOCAB_SIZE, make_abstract_mesh(sizes)))
    for sizes in ({}, {'data': 2, 'fsdp': 2, 'expert': 2})
  )
  assert one <= eight < 1.5 * one


@pytest.mark.slow
def test_a_device_may_have_fewer_tokens_than_experts(tiny):
  """No rows are computed at balanced loads then, only the overflow."""
  config = experiment.resolve_auto(
    tiny({'moe.num_experts': 64, 'moe.dispatch': 'dropless'})
  )
  mesh = make_abstract_mesh({'expert': 2})
  made = program.make(config, VOCAB_SIZE, mesh)
  assert program.flops(made) > 0


# What XLA writes, shortened: a loop of 5 iterations, one of unknown length.
_HLO = """
%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[64]{0} all-gather(%p), replica_groups=[4,8]<=[32], dimensions={0}
}

%open (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %l = f32[8]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %m = f32[8]{0} while(%x), condition=%c, body=%open
  %s = f32[2]{0} reduce-scatter(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, to_apply=%add
  ROOT %r = (f32[8]{0}, f32[1]{0}) all-reduce(%x, %s), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_count_by_their_loops_and_groups():
  found = collectives.count(_HLO)
  assert found.open_loops == 1
  assert found.kinds == {
    'all-gather': (5, 5 * 256, 5 * 256 * 7 / 8),
    'reduce-scatter': (1, 8, 3 * 8),
    'all-reduce': (1, 36, 36),
  }
  doubled = collectives.extrapolate(found, found, 3)
  assert doubled == found
  assert collectives.from_json(json.loads(json.dumps(found))) == found


def test_groups_of_an_unknown_form_are_an_error():
  with pytest.raises(ValueError, match='replica groups'):
    collectives.count(_HLO.replace('[4,8]<=[32]', 'strange'))


def _answer(layer=10.0, sequence=3.0):
  """Returns what a worker would say of a model that is linear in its sizes."""

  def ask(request, num_devices):
    ask.request, ask.num_devices = request, num_devices
    return {
      'dispatch': 'dropless',
      'precision': 'float32',
      'num_params': 100,
      'num_active_params': 50,
      'flops_per_token': 3.0,
      'active_flops_per_token': 2.0,
      'generation_problem': '',
      'state': {'weights': 100, 'optimizer': 200, 'average': 0}
      | {'model_state': 0},
      'logits': 5,
      'process': {'compiling': 7, 'compiled': 5},
      'points': [
        [
          depth,
          batch,
          310,
          depth * (layer + sequence * batch) + 1000,
          [{'all-reduce': [depth + 1, 4.0 * depth, 2.0 * depth]}, 0],
          1.0,
        ]
        for batch in request['batch_sizes']
        for depth in request['depths']
      ],
    }

  return ask


def test_two_depths_and_two_batches_are_extrapolated(tiny, monkeypatch):
  ask = _answer()
  monkeypatch.setattr(estimate, 'ask', ask)
  config = tiny({'model.num_layers': 33, 'moe.every': 2, 'batch_size': 8})
  target = estimate.Target(memory=10_000, peak_flops=1e3)
  plan = estimate.make(config, VOCAB_SIZE, target)
  assert ask.request['depths'] == [5, 7]
  assert ask.request['batch_sizes'] == [8, 32, 128]
  assert plan['memory']['total'] == 310 + 33 * (10 + 3 * 8) + 1000
  assert plan['collectives']['all-reduce']['count'] == 34
  assert plan['bytes_per_sequence'] == 33 * 3
  assert plan['largest_batch_size'] == (10_000 - 1310 - 330) // 99
  assert plan['memory']['activations'] == 33 * 34 + 1000 - 100 - 5


def test_copies_of_the_data_exceed_the_virtual_devices(tiny, monkeypatch):
  ask = _answer()
  monkeypatch.setattr(estimate, 'ask', ask)
  config = tiny(
    {'mesh.data': 8, 'mesh.fsdp': 512, 'batch_size': 4096}
    | {'model.scan_layers': True, 'model.num_layers': 64}
  )
  estimate.make(config, VOCAB_SIZE, estimate.Target(4096))
  assert ask.num_devices == 2048
  assert ask.request['sizes']['data'] == 8
  assert ask.request['compiled_sizes']['data'] == 4
  assert ask.request['depths'] == [64]


def test_a_model_that_does_not_fit_is_a_line(tiny, monkeypatch):
  monkeypatch.setattr(estimate, 'ask', _answer())
  target = estimate.Target(memory=1200)
  with pytest.raises(UserError, match=r'1\.20 kB.*batch_size=1.*300 B'):
    estimate.make(tiny(), VOCAB_SIZE, target)


@pytest.fixture
def command(corpus):
  """command(changes, *flags) runs the command in this process."""

  def run(changes, *flags):
    plan_command._FLAGS.unparse_flags()
    words = _words(corpus, changes, *flags)
    return plan_command.main(plan_command._parse(['plan', *words]))

  yield run
  plan_command._FLAGS.unparse_flags()


@pytest.mark.parametrize(
  ('changes', 'flags', 'words'),
  [
    ({}, ['--format=yaml'], ['format', 'yaml', 'json']),
    ({}, ['--memory=much'], ['--memory=much', '80GB']),
    ({}, ['--memory=0GB'], ['--memory=0GB']),
    ({}, ['--mfu=2'], ['--mfu=2']),
    ({}, ['--device=b1'], ['--device=b1', 'h200']),
    ({}, ['--vocab_size=0'], ['vocab_size', '0']),
    ({}, ['more'], ['more']),
    ({'mesh.data': -1}, [], ['mesh.data=-1', '--devices']),
    ({'mesh.data': -1, 'mesh.fsdp': -1}, ['--devices=8'], ['only one']),
    ({'mesh.data': -1, 'mesh.fsdp': 3}, ['--devices=8'], ['mesh.fsdp=3', '8']),
    ({'mesh.fsdp': 4}, ['--devices=10'], ['--devices=10', 'mesh.fsdp=4']),
    ({'mesh.fsdp': 3}, [], ['batch_size=4', '3']),
    ({'mesh.fsdp': 4096, 'batch_size': 4096}, [], ['4096', '2048']),
    ({'moe.topk': 3}, [], ['moe.topk', 'moe.top_k']),
  ],
)
def test_mistakes_are_a_line(command, changes, flags, words):
  with pytest.raises(UserError) as error:
    command(changes, *flags)
  (line,) = error.value.problems
  for word in words:
    assert word in line


@pytest.mark.slow
def test_a_mistake_of_a_part_is_a_line_of_the_command(run, corpus):
  words = _words(corpus, {'moe.router.type': 'TopK', 'moe.router.k': 3})
  process = run([sys.executable, '-m', 'nanomoe.plan', *words])
  assert process.returncode == 2
  (line,) = process.stderr.splitlines()
  assert line.startswith('error: moe.router')


@pytest.mark.parametrize(
  ('text', 'size'),
  [
    ('80GB', 80 * 10**9),
    ('80GiB', 80 * 2**30),
    ('8e10', 8 * 10**10),
    ('1.5 kB', None),
    ('1.5KB', 1500),
    ('-1GB', None),
    ('nan', None),
  ],
)
def test_amounts_of_memory(text, size):
  if size is None:
    with pytest.raises(UserError):
      hardware.parse_bytes(text, '--memory')
  else:
    assert hardware.parse_bytes(text, '--memory') == size


def test_amounts_are_shown_with_a_unit():
  shown = [hardware.shown(x) for x in (0, 999, 1000, 999_900, 1.25e9, 3e16)]
  assert shown == ['0 B', '999 B', '1.00 kB', '1.00 MB', '1.25 GB', '30000 TB']


@pytest.mark.parametrize(
  ('changes', 'size'),
  [
    ({}, 20),
    ({'data.tokenizer.type': 'Bytes', 'data.path': ''}, 256),
    ({'data.tokenizer.type': 'BPE', 'data.path': ''}, 1024),
    (
      {
        'data.tokenizer.type': 'BPE',
        'data.path': '',
        'data.tokenizer.vocab_size': 300,
      },
      300,
    ),
  ],
)
def test_the_size_of_a_vocabulary(tiny, changes, size):
  assert vocabulary.size(tiny(changes)) == size


def test_the_size_of_a_tokenizer_file(tiny, tmp_path):
  path = tmp_path / 'tokenizer.json'
  config = tiny({'data.tokenizer.type': 'BPE', 'data.tokenizer.file': path})
  with pytest.raises(UserError, match='No such file'):
    vocabulary.size(config)
  path.write_text('{"model": {}}')
  with pytest.raises(UserError, match='tokenizer'):
    vocabulary.size(config)
  state = {'model': {'vocab': {'a': 0, 'b': 6}}, 'added_tokens': [{'id': 7}]}
  path.write_text(json.dumps(state))
  assert vocabulary.size(config) == 8


@pytest.mark.slow
@pytest.mark.optimized
def test_the_plan_is_the_compiled_step_of_a_run(tiny, tmp_path):
  config = tiny({'num_train_steps': 1, 'optimizer.ema_decay': 0.9})
  trainer = experiment.build(config, tmp_path)
  trainer.fit()
  update: Any = trainer._step_runner._update
  analysis = update.result().memory_analysis()
  plan = estimate.make(config, VOCAB_SIZE, estimate.Target())
  assert plan['memory']['total'] == pytest.approx(
    analysis.argument_size_in_bytes + analysis.temp_size_in_bytes, rel=0.01
  )


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [1, 4])
def test_an_extrapolated_plan_is_that_of_all_layers(tiny, monkeypatch, mesh):
  monkeypatch.setattr(estimate, 'BATCH_FACTORS', (1, 4))
  config = tiny(
    {'model.num_layers': 3, 'model.remat': 'block', 'mesh.fsdp': mesh}
    | {'batch_size': 32, 'model.d_model': 64}
  )
  # Programs of further batches take minutes to compile on a mesh.
  target = estimate.Target(memory=10**9 if mesh == 1 else 0)
  whole = estimate.make(config, VOCAB_SIZE, target)
  short = estimate.make(config, VOCAB_SIZE, target, max_layers=2)
  assert whole['compiled']['depths'] == [3]
  assert short['compiled']['depths'] == [1, 2]
  for term in (*TERMS, 'total'):
    assert short['memory'][term] == pytest.approx(
      whole['memory'][term], rel=0.05, abs=2000
    )
  for kind, found in whole['collectives'].items():
    assert short['collectives'][kind]['result_bytes'] == pytest.approx(
      found['result_bytes'], rel=0.05
    )
  if mesh == 1:
    ratio = short['largest_batch_size'] / whole['largest_batch_size']
    assert math.isclose(ratio, 1, rel_tol=0.05)


@pytest.mark.slow
def test_the_state_on_a_mesh_is_that_of_placed_arrays(run, tmp_path):
  """Arrays on eight virtual devices, against shapes without devices."""
  code = """
import jax, json
from configs import base
from nanomoe import experiment
from nanomoe.config import overrides
from nanomoe.planning import program
from trainers.mesh import make_abstract_mesh, make_mesh
from tests.shrunk import ROOT, TINY, mostly_slow
sizes = {'fsdp': 2, 'expert': 2, 'tensor': 2}
changes = {**TINY, 'optimizer.ema_decay': 0.9, 'optimizer.type': 'Muon'}
config = experiment.resolve_auto(
  overrides.apply(base.get_config(), [(k, str(v)) for k, v in changes.items()]))
real, planned = (program.make(config, 20, make(sizes))
  for make in (make_mesh, make_abstract_mesh))
make = jax.jit(
  lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), real.state),
  out_shardings=jax.tree.map(lambda x: x.sharding, real.state))
leaves = jax.tree.leaves(make())
placed = sum(x.addressable_shards[0].data.nbytes for x in leaves)
print(json.dumps([placed, sum(program.state_bytes(planned).values())]))
"""
  process = run(
    [sys.executable, '-c', code],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '8'},
  )
  assert process.returncode == 0, process.stderr
  placed, planned = json.loads(process.stdout.splitlines()[-1])
  assert placed == planned > 0
