"""Checkpoints of any mesh and of any layout are read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import bits

from benchmarks import restores
from nanomoe import experiment
from nanomoe.model import checkpoints
from tests.runs import result_of
from trainers.checkpoint import arrays, reader
from trainers.checkpoint.checkpointer import Checkpointer
from trainers.errors import UserError
from trainers.mesh import Placement, make_mesh


def test_fingerprints_do_not_depend_on_the_mesh(rng):
  tree = {
    'matrix': rng.normal(size=(16, 8, 4)).astype(np.float32),
    'half': rng.normal(size=(8, 3)).astype(jnp.bfloat16),
    'whole': rng.integers(-9, 9, (24,)).astype(np.int32),
    'flags': rng.integers(0, 2, (8, 5)).astype(bool),
    'scalar': np.float32(3.5),
  }
  expected = arrays.fingerprints(tree)
  placement = Placement(make_mesh({'data': 4, 'fsdp': 2}))
  divided = {
    name: placement.put(x, placement.batch if np.ndim(x) else None)
    for name, x in tree.items()
  }
  assert not divided['matrix'].is_fully_replicated
  assert arrays.fingerprints(divided) == expected
  changed = {**divided, 'whole': divided['whole'].at[5].add(1)}
  assert arrays.fingerprints(changed)['whole'] != expected['whole']


@pytest.mark.slow
def test_a_run_is_resumed_on_any_mesh(tmp_path):
  # Each is saved and resumed once; benchmarks/restores.py has all pairs.
  names = ['one device', 'tensor 4', 'data 2 x fsdp 2 x expert 2']
  pairs = zip(names, [*names[1:], names[0]], strict=True)
  for row in restores.measure(tmp_path, pairs):
    assert row['same_fingerprints'], row
    assert row['same_batch'], row
    assert row['loss'] < 1e-6, row


def test_a_checkpoint_is_read_on_one_device(tmp_path, rng):
  """Without shapes, as `evaluate` and `generate` read it."""
  directory = tmp_path.absolute() / 'checkpoints'
  placement = Placement(make_mesh({'fsdp': 8}))
  x = rng.normal(size=(16, 4)).astype(np.float32)
  saver = Checkpointer(directory)
  saver.save(1, {'x': placement.put(x, placement.batch)}, {'best': None}, None)
  saver.wait()
  saver.close()
  found, _ = reader.read(directory, 'latest')
  np.testing.assert_array_equal(found['x'], x)
  assert found['x'].sharding.device_set == {jax.devices()[0]}


@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
def test_features_are_grouped_with_their_key_and_value(num_kv_heads):
  heads = [f'q{i}' for i in range(4)]
  heads += [f'{kind}{i}' for kind in 'kv' for i in range(num_kv_heads)]
  number = {name: i for i, name in enumerate(heads)}
  x = jnp.repeat(jnp.arange(len(heads)), 3)[None]
  grouped = np.asarray(checkpoints.group_features(x, 4, num_kv_heads))
  size = 4 // num_kv_heads
  expected = [
    number[name]
    for i in range(num_kv_heads)
    for name in (*(f'q{size * i + j}' for j in range(size)), f'k{i}', f'v{i}')
  ]
  assert grouped[0, ::3].tolist() == expected
  assert grouped[0, 1::3].tolist() == expected


def _ungrouped(config, tree):
  """Returns arrays in the layout of checkpoints without a number."""
  num_heads = config.model.num_heads
  order = np.asarray(
    checkpoints.group_features(
      jnp.arange(3 * config.model.d_model), num_heads, num_heads
    )
  )
  return {
    name: x[..., np.argsort(order)] if '.attention.qkv.' in name else x
    for name, x in tree.items()
  }


@pytest.mark.slow
def test_a_run_of_an_older_layout_is_resumed(tiny, tmp_path):
  """Its state is that of a run which this version began."""
  changes = {'precision': 'float32', 'optimizer.type': 'Muon'}
  changes |= {'model.num_layers': 1, 'sample.num_tokens': 0}
  config = tiny({**changes, 'num_train_steps': 4})
  old, new = tmp_path / 'old', tmp_path / 'new'
  for workdir in (old, new):
    workdir.mkdir()
    assert experiment.build(config, workdir).fit() == 'done'
  directory = old.absolute() / 'checkpoints'
  tree, meta = reader.read(directory, '4')
  assert meta['layout'] == 2
  kept = ('identity', 'num_rollbacks', 'next_hook', 'metrics_size', 'score')
  kept = {name: meta[name] for name in (*kept, 'best', 'callbacks')}
  saver = Checkpointer(directory)
  saver.save(4, _ungrouped(config, tree), kept, 4)
  saver.wait()
  saver.close()
  path = directory / '4' / 'meta' / 'metadata'
  assert json.loads(path.read_text())['layout'] == 1
  more = tiny({**changes, 'num_train_steps': 6})
  ends = []
  for workdir in (old, new):
    trainer = experiment.build(more, workdir)
    assert trainer.fit() == 'done'
    assert result_of(workdir)['step'] == 6
    ends.append(bits(trainer.state))
  assert ends[0] == ends[1]
  resolved = experiment.resolve_auto(more)
  of_old, of_new = (
    experiment.restore(resolved, workdir, '4').params for workdir in (old, new)
  )
  assert bits(of_old) == bits(of_new)


def test_a_newer_layout_is_refused(tmp_path):
  directory = tmp_path.absolute() / 'checkpoints'
  saver = Checkpointer(directory, layout=reader.Layout(9))
  saver.save(1, {'x': np.ones(3, np.float32)}, {'best': None}, None)
  saver.wait()
  saver.close()
  with pytest.raises(UserError) as error:
    reader.read(directory, 'latest', reader.Layout(2))
  assert 'its layout is 9, and this version reads up to 2' in str(error.value)
  with pytest.raises(UserError):
    Checkpointer(directory).restore({'x': jnp.ones(3)})
