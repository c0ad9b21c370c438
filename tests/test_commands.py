"""nanomoe.generate and nanomoe.evaluate, on a finished run."""

import json
import math
import sys

import numpy as np
import pytest

from nanomoe import evaluate as evaluate_lib
from nanomoe import generate as generate_lib
from nanomoe import workdir as workdir_lib
from nanomoe.data.tokenizers import load
from trainers.errors import UserError


@pytest.fixture
def nanomoe(run, finished):
  """nanomoe(command, *arguments) -> the finished process."""
  workdir, _ = finished

  def start(command, *arguments):
    words = [sys.executable, '-m', f'nanomoe.{command}']
    return run([*words, f'--workdir={workdir}', *arguments])

  return start


def _pieces(workdir, prompts, **kwargs):
  pieces = generate_lib.generate(workdir, prompts, **kwargs)
  return [''.join(row) for row in zip(*pieces, strict=True)]


def test_the_text_alone_is_on_standard_output(nanomoe, finished):
  """The same seed, the same text; nothing else but the prompt."""
  workdir, _ = finished
  process = nanomoe('generate', '--prompt=abc', '--num_tokens=40', '--seed=3')
  assert process.returncode == 0, process.stderr
  assert process.stdout.startswith('abc')
  assert len(process.stdout) == 3 + 40 + 1
  [text] = _pieces(workdir, ['abc'], num_tokens=40, seed=3)
  assert process.stdout == f'abc{text}\n'


def test_prompts_in_a_batch_and_options(finished):
  workdir, _ = finished
  greedy = dict(num_tokens=30, temperature=0.0)
  together = _pieces(workdir, ['a', 'bcd' * 20], **greedy)
  assert together == [
    *_pieces(workdir, ['a'], **greedy),
    *_pieces(workdir, ['bcd' * 20], **greedy),
  ]
  assert together[:1] == _pieces(workdir, ['a'], num_tokens=30, top_k=1)
  one = _pieces(workdir, ['a'], num_tokens=30, seed=1)
  assert one != _pieces(workdir, ['a'], num_tokens=30, seed=2)
  older = _pieces(workdir, ['a'], step='8', **greedy)
  assert older == _pieces(workdir, ['a'], step='8', **greedy)


@pytest.mark.parametrize(
  ('kwargs', 'words'),
  [
    (dict(prompts=['aXb']), ["'X'", 'position 1']),
    (dict(prompts=['']), ['--prompt', 'empty']),
    (dict(step='7'), ['7', '8, 12']),
    (dict(step='soon'), ['soon', 'best', 'latest']),
  ],
)
def test_mistakes_are_told_in_a_line(finished, kwargs, words):
  workdir, _ = finished
  with pytest.raises(UserError) as error:
    generate_lib.generate(workdir, **{'prompts': ['a'], **kwargs})
  [line] = error.value.problems
  for word in words:
    assert word in line


def test_no_run_and_no_checkpoint(tmp_path, finished):
  with pytest.raises(UserError, match=r'config\.json'):
    generate_lib.generate(tmp_path, ['a'])
  workdir, _ = finished
  text = (workdir / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='no checkpoint'):
    generate_lib.generate(tmp_path, ['a'])


@pytest.mark.parametrize(
  'text', ['', '[]', '{"characters": "ba"}', '{"characters": 5}', '{}']
)
def test_a_damaged_vocabulary_is_named(tmp_path, text):
  path = tmp_path / 'vocabulary.json'
  path.write_text(text)
  with pytest.raises(UserError, match=r'vocabulary\.json'):
    load({'type': 'Characters'}, path)


def test_evaluation_is_exact_json(nanomoe, finished, corpus):
  """Equal to what a loop over the split's windows sums up."""
  workdir, _ = finished
  process = nanomoe('evaluate', '--split=val', '--step=12')
  assert process.returncode == 0, process.stderr
  result = json.loads(process.stdout)
  assert result == {
    **evaluate_lib.evaluate(workdir, 'val', '12'),
    'tokens_per_sec': result['tokens_per_sec'],
  }
  num_tokens = len(corpus.read_text()) // 10 - 1
  assert (result['step'], result['num_tokens']) == (12, num_tokens)
  assert result['cross_entropy'] == pytest.approx(
    result['bits_per_char'] * math.log(2), rel=1e-5
  )
  np.testing.assert_allclose(np.sum(result['expert_load'], axis=1), 1, 1e-5)


def test_evaluation_of_the_training_split_is_another(finished):
  workdir, _ = finished
  train = evaluate_lib.evaluate(workdir, 'train', 'best')
  val = evaluate_lib.evaluate(workdir, 'val', 'best')
  assert train['step'] == val['step']
  assert train['num_tokens'] > 8 * val['num_tokens']
  assert train['cross_entropy'] != val['cross_entropy']


def test_other_data_is_refused(finished, tmp_path):
  """The text behind the run's data.path has changed."""
  workdir, _ = finished
  config = workdir_lib.config_of(workdir)
  other = tmp_path / 'text.txt'
  with open(config.data.path) as f:
    other.write_text(f.read()[::-1])
  for name in ('vocabulary.json', 'checkpoints'):
    (tmp_path / name).symlink_to(workdir / name)
  config.data.path = str(other)
  workdir_lib.write_json(tmp_path / 'config.json', config.to_dict())
  with pytest.raises(UserError, match='the text has changed'):
    evaluate_lib.evaluate(tmp_path, 'val', 'best')
