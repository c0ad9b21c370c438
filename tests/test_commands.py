"""nanomoe.generate and nanomoe.evaluate, on a finished run."""

import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import evaluate as evaluate_lib
from nanomoe import experiment
from nanomoe import generate as generate_lib
from nanomoe.run import workdir as workdir_lib
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


@pytest.mark.slow
def test_the_text_alone_is_on_standard_output(nanomoe, finished):
  """The same seed, the same text; nothing else but the prompt."""
  workdir, _ = finished
  limits = dict(num_tokens=40, seed=3, temperature=0.5, top_k=9, top_p=0.6)
  process = nanomoe(
    'generate', '--prompt=abc', *(f'--{k}={v}' for k, v in limits.items())
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.startswith('abc')
  assert len(process.stdout) == 3 + 40 + 1
  [text] = _pieces(workdir, ['abc'], **limits)
  assert process.stdout == f'abc{text}\n'


@pytest.mark.slow
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


@pytest.mark.parametrize(
  ('kwargs', 'words'),
  [
    (dict(prompts=['aXb']), ['--prompt', "'X'", 'position 1']),
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


@pytest.mark.parametrize('ending', ['!', '\N{EURO SIGN}'])
def test_characters_are_whole_however_tokens_cut_them(ending):
  """Bytes, for example: nothing is shown of a character until it is there."""
  whole = 'aé€\N{GRINNING FACE}' + ending
  cut = whole.encode()[: -1 if ending != '!' else None]

  def decode(tokens):
    return bytes(tokens).decode(errors='replace')

  text = generate_lib.Text(decode, list('è'.encode()))
  pieces = [text.add(b, last=i == len(cut)) for i, b in enumerate(cut, 1)]
  assert ''.join(pieces) == cut.decode(errors='replace')
  assert pieces[:7] == ['a', '', 'é', '', '', '€', '']
  assert not any('\ufffd' in piece for piece in pieces[:-1])


def test_no_run_and_no_checkpoint(tmp_path, finished):
  with pytest.raises(UserError, match=r'config\.json'):
    generate_lib.generate(tmp_path, ['a'])
  workdir, _ = finished
  text = (workdir / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='no checkpoint'):
    generate_lib.generate(tmp_path, ['a'])


def test_a_config_of_another_version_is_told(finished, tmp_path):
  workdir, _ = finished
  config = json.loads((workdir / 'config.json').read_text())
  del config['moe']['top_k']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match=r'config\.json: moe\.top_k is missing'):
    generate_lib.generate(tmp_path, ['a'])


@pytest.mark.slow
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
  text = corpus.read_text()
  num_tokens = len(text) // 10 - 1
  assert (result['step'], result['num_tokens']) == (12, num_tokens)
  trained = experiment.restore(workdir_lib.config_of(workdir), workdir, '12')
  tokens = trained.tokenizer.encode(text[len(text) * 9 // 10 :])
  state, nats = (trained.params, trained.model_state), 0.0
  for start in range(0, num_tokens, 16):
    window = jnp.asarray(tokens[start : start + 17])[None]
    logits = np.float64(trained.task.logits(state, window[:, :-1])[0][0])
    chosen = logits[np.arange(len(logits)), window[0, 1:]]
    nats += np.sum(np.log(np.exp(logits).sum(axis=1)) - chosen)
  assert result['cross_entropy'] == pytest.approx(nats / num_tokens, rel=1e-3)
  assert result['cross_entropy'] == pytest.approx(
    result['bits_per_char'] * math.log(2), rel=1e-5
  )
  np.testing.assert_allclose(np.sum(result['expert_load'], axis=1), 1, 1e-5)


@pytest.mark.slow
def test_evaluation_of_the_training_split_is_another(finished):
  workdir, _ = finished
  train = evaluate_lib.evaluate(workdir, 'train', 'best')
  val = evaluate_lib.evaluate(workdir, 'val', 'best')
  best = json.loads((workdir / 'result.json').read_text())['best_step']
  assert train['step'] == val['step'] == best != 12
  assert train['num_tokens'] > 8 * val['num_tokens']
  assert train['cross_entropy'] != val['cross_entropy']


@pytest.mark.slow
def test_any_text_can_be_evaluated_on(finished, corpus, tmp_path):
  """The whole of it: the validation split as a file gives the split's loss."""
  workdir, _ = finished
  text = corpus.read_text()
  path = tmp_path / 'other.txt'
  path.write_text(text[len(text) * 9 // 10 :])
  split = evaluate_lib.evaluate(workdir, 'val', 'best')
  other = evaluate_lib.evaluate(workdir, 'val', 'best', str(path))
  assert other.pop('data') == str(path)
  assert split.pop('split') == 'val'
  assert {**other, 'tokens_per_sec': 0} == {**split, 'tokens_per_sec': 0}


@pytest.mark.parametrize(
  ('text', 'told'),
  [
    (None, 'no such file'),
    ('', 'empty'),
    ('abcZ' * 20, "'Z' at position 3"),
    ('a', '1 of the 2'),
  ],
)
def test_texts_that_cannot_be_evaluated_on(finished, tmp_path, text, told):
  workdir, _ = finished
  path = tmp_path / 'other.txt'
  if text is not None:
    path.write_text(text)
  with pytest.raises(UserError) as error:
    evaluate_lib.evaluate(workdir, 'val', 'best', str(path))
  (line,) = error.value.problems
  assert told in line and f'--data={path}' in line.replace("'", '')


def test_a_split_is_not_of_another_text(nanomoe):
  process = nanomoe('evaluate', '--split=val', '--data=text.txt')
  assert process.returncode == 2
  assert process.stderr.startswith('error: --split')


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
  with pytest.raises(UserError, match=r'data\.path=.*--allow_changed=data'):
    evaluate_lib.evaluate(tmp_path, 'val', 'best')
