"""Starting from another run's weights."""

import json
import shutil

import numpy as np
import pytest

from nanomoe import evaluate as evaluate_lib
from nanomoe import experiment, main
from trainers.checkpoint import reader
from trainers.errors import UserError

# Steps that move nothing: what is evaluated is what the run started from.
STILL = {
  'num_train_steps': 2,
  'eval_interval': 2,
  'eval_iters': 0,
  'optimizer.learning_rate': 0.0,
  'optimizer.weight_decay': 0.0,
  'sample.num_tokens': 0,
}


@pytest.fixture
def text(corpus, tmp_path):
  """Another text, of some of the characters of the first."""
  path = tmp_path / 'other.txt'
  path.write_text(corpus.read_text().replace('a', 'b')[:3000])
  return path


@pytest.mark.slow
def test_weights_and_vocabulary_come_from_the_best_checkpoint(
  finished, command, run, text, tmp_path
):
  source, _ = finished
  workdir = tmp_path / 'run'
  words = command(
    f'--init_from={source}',
    f'--workdir={workdir}',
    changes={**STILL, 'data.path': text},
  )
  process = run(words)
  assert process.returncode == 0, process.stderr
  best = json.loads((source / 'result.json').read_text())['best_step']
  assert f'starting from step {best} of {source}' in process.stdout
  vocabularies = [
    json.loads((d / 'vocabulary.json').read_text())['characters']
    for d in (source, workdir)
  ]
  assert vocabularies[0] == vocabularies[1]
  theirs, _ = reader.read(source / 'checkpoints', 'best')
  ours, _ = reader.read(workdir / 'checkpoints', 'latest')
  params = [name for name in theirs if name.startswith('state.params')]
  assert params
  for name in params:
    np.testing.assert_array_equal(ours[name], theirs[name])
  # The same command again: the run's own checkpoint, not the source.
  words += ['--config.num_train_steps=3']
  process = run(words)
  assert process.returncode == 0, process.stderr
  assert 'resuming after step 2' in process.stdout
  assert 'starting from' not in process.stdout


@pytest.mark.slow
def test_the_same_text_has_the_same_loss(finished, tiny, tmp_path):
  source, _ = finished
  trainer = experiment.build(tiny({**STILL, 'init_from': source}), tmp_path)
  assert trainer.fit() == 'done'
  exact = evaluate_lib.evaluate(source, 'val', 'best')['cross_entropy']
  assert trainer.score.value == pytest.approx(exact, rel=1e-6)


def test_a_strange_character_is_explained(finished, tiny, text, tmp_path):
  source, _ = finished
  text.write_text(text.read_text() + 'é' * 2000)
  changes = {'init_from': source, 'data.path': text}
  with pytest.raises(UserError) as error:
    experiment.build(tiny(changes), tmp_path)
  (line,) = error.value.problems
  for word in (str(source), 'other.txt', "'é'", 'position', 'vocabulary'):
    assert word in line


@pytest.mark.slow
def test_another_tokenizer_or_architecture_is_refused(finished, tiny, tmp_path):
  source, _ = finished
  changes = {'init_from': source, 'data.tokenizer.type': 'Bytes'}
  with pytest.raises(UserError, match=r"'Characters'.*'Bytes'"):
    experiment.build(tiny(changes), tmp_path)
  changes = {'init_from': source, 'moe.d_ff': 24}
  with pytest.raises(UserError) as error:
    experiment.build(tiny(changes), tmp_path).fit()
  first, *others = error.value.problems
  assert str(source) in first
  assert any('w_in' in line for line in others)


def test_a_source_without_a_run_is_told(command, run, tmp_path):
  process = run(command(f'--init_from={tmp_path}', f'--workdir={tmp_path}/run'))
  assert process.returncode == 2
  assert process.stderr == (
    f"error: init_from='{tmp_path}': there is no run (no config.json)\n"
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_resumed_run_does_not_need_its_source(finished, tiny, tmp_path):
  source = shutil.copytree(finished[0], tmp_path / 'source')
  config = tiny({**STILL, 'init_from': source})
  (tmp_path / 'run').mkdir()
  assert experiment.build(config, tmp_path / 'run').fit() == 'done'
  shutil.rmtree(source)
  config.num_train_steps = 3
  missing = [('init_from', str(source))]
  with pytest.raises(UserError, match='there is no run'):
    main.checked(config, missing, None, is_new=True)
  main.checked(config, missing, tmp_path / 'run', is_new=False)
  assert experiment.build(config, tmp_path / 'run').fit() == 'done'
