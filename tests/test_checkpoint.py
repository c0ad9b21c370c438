"""Checkpoints: what comes back, what is kept, and what damage does."""

import logging
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from regression import bits

from trainers.checkpoint.checkpointer import Checkpointer
from trainers.errors import UserError


def tree_of(step):
  """Of several types and depths; a function of `step`."""
  random = np.random.default_rng(step)
  w = random.normal(size=(3, 4)).astype(np.float32)
  w[0, 0], w[0, 1], w[0, 2] = np.nan, -0.0, np.inf
  return jax.tree.map(
    jnp.asarray,
    {
      'params': {'block_0/w': w, 'b': w[1].astype(ml_dtypes.bfloat16)},
      'moments': [np.float16(step / 3), (np.int32(step),)],
      'flags': {'mask': w > 0, 'bytes': np.arange(5, dtype=np.uint8)},
      'nothing': (),
    },
  )


def abstract_of(tree):
  return jax.eval_shape(lambda: tree)


ABSTRACT = abstract_of(tree_of(0))


def save_all(directory, steps, keep_latest=2, best=None):
  checkpointer = Checkpointer(directory, keep_latest)
  for step in steps:
    note = {'note': f'of {step}'}
    known = best if best and best <= step else None
    checkpointer.save(step, tree_of(step), note, known)
  checkpointer.close()


def restore(directory, abstract=None, keep_latest=2):
  checkpointer = Checkpointer(directory, keep_latest)
  try:
    return checkpointer.restore(ABSTRACT if abstract is None else abstract)
  finally:
    checkpointer.close()


def steps_in(directory):
  return {int(path.name) for path in directory.iterdir()}


@pytest.fixture
def directory(tmp_path):
  return tmp_path / 'checkpoints'


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """A directory with checkpoints 1 and 2, to copy."""
  directory = tmp_path_factory.mktemp('two') / 'checkpoints'
  save_all(directory, [1, 2])
  return directory


def test_restores_bitwise(two):
  saved = restore(two)
  assert bits(saved.tree) == bits(tree_of(2))
  assert jax.tree.structure(saved.tree) == jax.tree.structure(tree_of(2))
  assert saved.meta['note'] == 'of 2'


def test_there_is_nothing_at_first(directory):
  assert restore(directory) is None


def test_a_save_copies_what_the_next_step_may_overwrite(directory):
  checkpointer = Checkpointer(directory)
  values = jnp.arange(100_000.0)
  wanted = np.array(values)
  checkpointer.save(1, {'x': values}, {}, None)
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  overwrite(values).block_until_ready()
  checkpointer.close()
  saved = restore(directory, {'x': jax.ShapeDtypeStruct((100_000,), 'float32')})
  np.testing.assert_array_equal(saved.tree['x'], wanted)


def test_directories_are_steps_and_the_newest_is_named(directory):
  checkpointer = Checkpointer(directory)
  assert checkpointer.newest is None
  checkpointer.save(7, tree_of(7), {}, None)
  checkpointer.wait()
  assert checkpointer.newest == 7
  checkpointer.close()
  assert [path.name for path in directory.iterdir()] == ['7']


def test_what_was_never_finished_goes_before_the_next_save(directory):
  """Writers of a save that failed may leave it there when all is told."""
  checkpointer = Checkpointer(directory)
  (directory / '1.orbax-checkpoint-tmp' / 'arrays').mkdir(parents=True)
  checkpointer.save(2, tree_of(2), {}, None)
  checkpointer.close()
  assert [path.name for path in directory.iterdir()] == ['2']


def test_saving_a_step_again_replaces_it(directory):
  checkpointer = Checkpointer(directory)
  checkpointer.save(3, tree_of(30), {'note': 'old'}, 3)
  checkpointer.save(3, tree_of(3), {'note': 'new'}, 3)
  checkpointer.close()
  saved = restore(directory)
  assert bits(saved.tree) == bits(tree_of(3))
  assert saved.meta['note'] == 'new'
  assert steps_in(directory) == {3}


@pytest.mark.parametrize(
  ('keep_latest', 'best', 'kept'),
  [(2, 2, {2, 4, 5}), (1, 5, {5}), (1, None, {5}), (3, 1, {1, 3, 4, 5})],
)
def test_keeps_the_newest_few_and_the_best(directory, keep_latest, best, kept):
  save_all(directory, range(1, 6), keep_latest, best)
  assert steps_in(directory) == kept


def test_the_best_survives_a_restart(directory):
  save_all(directory, [1, 2, 3], 1, best=2)
  checkpointer = Checkpointer(directory, 1)
  checkpointer.restore(ABSTRACT)
  for step in (4, 5):
    checkpointer.save(step, tree_of(step), {}, 2)
  checkpointer.close()
  assert steps_in(directory) == {2, 5}


@pytest.mark.parametrize('restarts', [False, True])
def test_undoing_a_best_leaves_the_best_before_it(directory, restarts):
  """Of a run whose newest best came after a refused update, and diverged."""
  checkpointer = Checkpointer(directory, 1)
  for step, best, standing in ((1, 1, 'good'), (2, 1, 'good')):
    checkpointer.save(step, tree_of(step), {'best': [1, 0.5]}, best, standing)
  if restarts:
    checkpointer.close()
    checkpointer = Checkpointer(directory, 1)
    checkpointer.restore(ABSTRACT)
  checkpointer.save(3, tree_of(3), {'best': [3, 0.4]}, 3, 'refused')
  checkpointer.wait()
  assert checkpointer.undo()
  checkpointer.close()
  assert steps_in(directory) == {1, 2}


# Damage.


def truncate(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
  'empty directory': lambda step: [shutil.rmtree(step), step.mkdir()],
  'no arrays': lambda step: shutil.rmtree(step / 'arrays'),
  'no meta': lambda step: shutil.rmtree(step / 'meta'),
  'cut arrays': lambda step: [
    truncate(path)
    for path in (step / 'arrays').rglob('*')
    if path.is_file() and path.parent.name == 'd'
  ],
  'cut meta': lambda step: [
    truncate(path) for path in (step / 'meta').rglob('*') if path.is_file()
  ],
  'cut everything': lambda step: [
    truncate(path) for path in step.rglob('*') if path.is_file()
  ],
  'emptied files': lambda step: [
    path.write_bytes(b'') for path in step.rglob('*') if path.is_file()
  ],
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_an_older_checkpoint_serves_when_the_newest_is_damaged(
  two, directory, caplog, damage
):
  shutil.copytree(two, directory)
  DAMAGES[damage](directory / '2')
  with caplog.at_level(logging.WARNING):
    saved = restore(directory)
  assert saved.meta['note'] == 'of 1'
  assert bits(saved.tree) == bits(tree_of(1))
  warnings = [
    r.getMessage()
    for r in caplog.records
    if r.name == 'trainers.checkpoint.checkpointer'
  ]
  assert len(warnings) == 1
  assert 'checkpoint 2' in warnings[0]


def test_no_damage_to_one_file_gives_wrong_numbers(two, directory, caplog):
  """The newest or the one before it, bitwise: nothing between, no crash."""
  caplog.set_level(logging.CRITICAL)
  found = set()
  files = [
    path.relative_to(two) for path in (two / '2').rglob('*') if path.is_file()
  ]
  for path in files:
    shutil.copytree(two, directory)
    truncate(directory / path)
    saved = restore(directory)
    step = {'of 1': 1, 'of 2': 2}[saved.meta['note']]
    assert bits(saved.tree) == bits(tree_of(step)), path
    found.add(step)
    shutil.rmtree(directory)
  assert 1 in found


def test_flipped_bits_all_over_are_damage(two, directory):
  shutil.copytree(two, directory)
  data = [p for p in (directory / '2' / 'arrays').rglob('d/*') if p.is_file()]
  for path in data:
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 4, len(content), 97):
      content[i] ^= 1
    path.write_bytes(content)
  assert restore(directory).meta['note'] == 'of 1'


def test_is_an_error_when_all_are_damaged(two, directory):
  shutil.copytree(two, directory)
  for step in (1, 2):
    DAMAGES['cut arrays'](directory / str(step))
  with pytest.raises(UserError) as error:
    restore(directory)
  text = str(error.value)
  assert 'checkpoint 1' in text
  assert 'checkpoint 2' in text
  assert str(directory) in text


@pytest.mark.parametrize('keep_latest', [1, 2])
def test_what_follows_a_damaged_checkpoint_is_kept(directory, keep_latest):
  """The damaged ones are newer, but they are no use."""
  save_all(directory, [1, 5, 6], 3)
  for step in (5, 6):
    DAMAGES['cut arrays'](directory / str(step))
  checkpointer = Checkpointer(directory, keep_latest)
  assert checkpointer.restore(ABSTRACT).meta['note'] == 'of 1'
  checkpointer.save(3, tree_of(3), {'note': 'of 3'}, None)
  checkpointer.close()
  assert restore(directory, keep_latest=keep_latest).meta['note'] == 'of 3'


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (
      {'params': {'block_0/w': jax.ShapeDtypeStruct((3, 5), 'float32')}},
      ['block_0/w', '[3, 4]', '[3, 5]'],
    ),
    (
      {'params': {'b': jax.ShapeDtypeStruct((4,), 'float32')}},
      ['params.b', 'bfloat16', 'float32'],
    ),
    (
      {'extra': jax.ShapeDtypeStruct((2,), 'int8')},
      ['extra', 'missing', 'int8'],
    ),
  ],
)
def test_another_architecture_is_refused_by_name(two, change, words):
  abstract = {
    key: {**ABSTRACT[key], **change[key]} if key in ABSTRACT else change[key]
    for key in change
  }
  with pytest.raises(UserError) as error:
    restore(two, {**ABSTRACT, **abstract})
  for word in words:
    assert word in str(error.value)
  untouched = 'flags.mask'
  assert untouched not in str(error.value)


def test_a_missing_leaf_is_refused_by_name(two):
  abstract = {k: v for k, v in ABSTRACT.items() if k != 'flags'}
  with pytest.raises(UserError, match=r'flags\.mask'):
    restore(two, abstract)


def test_a_save_that_fails_is_an_error_and_lets_the_process_end(directory):
  """In a process of its own: what Orbax leaves running must not hold it.

  Whether a save fails at once or in the background is a race: eight times.
  """
  script = f"""
import pathlib, shutil
import jax.numpy as jnp
from trainers.checkpoint import Checkpointer, SaveError
for i in range(8):
  directory = pathlib.Path({str(directory)!r}) / str(i)
  checkpointer = Checkpointer(directory)
  shutil.rmtree(directory)
  directory.write_text('in the way')
  try:
    checkpointer.save(4, {{'x': jnp.ones(3)}}, {{}}, None)
    checkpointer.wait()
  except SaveError as error:
    print(error, flush=True)
  assert checkpointer.newest is None
  checkpointer.close()
"""
  done = subprocess.run(
    [sys.executable, '-c', script],
    cwd=pathlib.Path(__file__).parent.parent,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('step 4') == 8


# What a save must not lose.


def test_the_old_one_stands_until_the_new_one_does(directory, monkeypatch):
  """Saving a step again, and dying before it lands, loses nothing."""
  save_all(directory, [3])
  code = f"""
import os, pathlib, jax.numpy as jnp
from trainers.checkpoint import Checkpointer, saver
checkpointer = Checkpointer(pathlib.Path({str(directory)!r}))
saver.Saver._copy = lambda *args, **kwargs: os._exit(9)
checkpointer.save(3, {{'x': jnp.ones(3)}}, {{}}, None)
"""
  assert subprocess.run([sys.executable, '-c', code]).returncode == 9
  assert not (directory / '3').exists()
  assert bits(restore(directory).tree) == bits(tree_of(3))
  assert not directory.with_name('superseded_checkpoints').exists()


def test_checkpoints_that_are_gone_are_no_fresh_start(directory):
  save_all(directory, [1, 2])
  shutil.rmtree(directory)
  with pytest.raises(UserError, match='gone'):
    restore(directory)


def test_a_directory_that_cannot_be_is_told(tmp_path):
  (tmp_path / 'checkpoints').write_text('a file')
  with pytest.raises(UserError, match='checkpoints'):
    Checkpointer(tmp_path / 'checkpoints')
