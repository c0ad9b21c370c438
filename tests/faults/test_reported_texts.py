"""Byte order marks and texts shorter than a window; what result.json says."""

import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from faults.conftest import fault
from nanomoe import evaluate, experiment, generate
from nanomoe.config import overrides as config_lib
from nanomoe.data import bpe, large_text, tokenizers
from nanomoe.data import corpus as corpus_lib
from nanomoe.data import pipeline as text_lib
from nanomoe.data.windows import Windows
from nanomoe.run import workdir as workdir_lib
from tests.runs import lines_of, result_of
from trainers.callbacks import Result
from trainers.errors import UserError

MARK = b'\xef\xbb\xbf'
TEXT = 'Où est-ce?\r\nLà.\n' * 40


def one_line(call, *args, **kwargs) -> str:
  with pytest.raises(UserError) as error:
    call(*args, **kwargs)
  (line,) = error.value.problems
  assert '\n' not in line
  return line


@pytest.fixture(params=[True, False], ids=['in memory', 'in pieces'])
def sized(request, monkeypatch, tmp_path):
  """Texts are small, and then large."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  if not request.param:
    monkeypatch.setattr(corpus_lib, 'IN_MEMORY_BYTES', 0)
    monkeypatch.setattr(large_text, 'PIECE_BYTES', 100)


@pytest.fixture
def marked(tmp_path):
  path = tmp_path / 'marked.txt'
  path.write_bytes(MARK + TEXT.encode())
  return path


# A byte order mark.


@pytest.mark.reported('bom')
@fault(
  'a text that begins with a byte order mark',
  'it is dropped, with a log line; the text is the same as without',
)
def test_a_byte_order_mark(marked, tmp_path, sized, caplog, happened):
  caplog.set_level(logging.INFO)
  plain = tmp_path / 'plain.txt'
  plain.write_bytes(TEXT.encode())
  found, expected = (corpus_lib.read(str(p)) for p in (marked, plain))
  assert str(found.text) == str(expected.text) == TEXT
  assert found.fingerprint == expected.fingerprint
  (told,) = [r.getMessage() for r in caplog.records if 'mark' in r.message]
  assert str(marked) in told
  for split, text in text_lib.split(found.text).items():
    assert str(text) == text_lib.split(TEXT)[split]
  happened(told.replace(str(tmp_path), '...')[:120])


@pytest.mark.reported('bom')
@fault(
  'a run that an older version began, with the mark as a token, goes on',
  'the same tokens; without the mark in the file, the text has changed',
)
def test_an_older_run_on_a_marked_text(
  tiny, marked, tmp_path, sized, monkeypatch, happened
):
  config = tiny({'data.path': marked})
  run = tmp_path / 'run'
  run.mkdir()
  with monkeypatch.context() as older:
    older.setattr(corpus_lib, 'MARK', 'none')
    corpus, tokenizer, before = text_lib.read(config, run)
  assert '\ufeff' in tokenizer.characters
  facts = {'corpus': corpus.name, 'corpus_sha256': corpus.fingerprint}
  workdir_lib.write_json(
    run / text_lib.VOCABULARY, {**tokenizer.state_dict(), **facts}
  )
  again = text_lib.read(config, run)
  assert again[0].fingerprint == corpus.fingerprint
  assert again[2].fingerprint == before.fingerprint
  new = text_lib.read(config, tmp_path / 'new')
  assert '\ufeff' not in new[1].characters
  marked.write_bytes(TEXT.encode())
  line = one_line(text_lib.read, config, run)
  assert f'data.path={str(marked)!r}' in line
  assert '--allow_changed=data' in line
  happened('equal fingerprints of the tokens')


@pytest.mark.reported('bom')
@fault(
  'a run on a marked text goes on after an editor removed the mark',
  'it is the same text',
)
def test_a_mark_that_went(tiny, marked, tmp_path, sized, happened):
  config = tiny({'data.path': marked})
  corpus, tokenizer, before = text_lib.read(config, tmp_path)
  facts = {'corpus': corpus.name, 'corpus_sha256': corpus.fingerprint}
  workdir_lib.write_json(
    tmp_path / text_lib.VOCABULARY, {**tokenizer.state_dict(), **facts}
  )
  for raw in (TEXT.encode(), MARK + TEXT.encode()):
    marked.write_bytes(raw)
    again = text_lib.read(config, tmp_path)
    assert again[2].fingerprint == before.fingerprint
  happened('equal fingerprints of the tokens')


@pytest.mark.reported('bom')
@pytest.mark.parametrize(
  ('raw', 'part'),
  [
    pytest.param(raw, part, id=what, marks=fault(what, 'one line'))
    for what, raw, part in [
      ('a text that is a byte order mark alone', MARK, 'empty'),
      ('a text in UTF-16', TEXT.encode('utf-16'), 'UTF-16'),
      ('a text in UTF-16, big end first', b'\xfe\xff\0a\0b', 'UTF-16'),
    ]
  ],
)
def test_marks_of_no_text(tmp_path, sized, happened, raw, part):
  path = tmp_path / 'text.txt'
  path.write_bytes(raw)
  line = one_line(corpus_lib.read, str(path), '--data')
  assert str(path) in line
  assert part in line
  happened(line.replace(str(tmp_path), '...')[:120])


@pytest.mark.reported('bom')
@fault(
  'a byte order mark in config.json, vocabulary.json and a tokenizer.json',
  'they are read as without it',
)
def test_marks_in_json(tmp_path, happened):
  path = tmp_path / 'config.json'
  path.write_bytes(MARK + b'{"seed": 1}')
  assert dict(workdir_lib.read_config(tmp_path) or {})['seed'] == 1
  path = tmp_path / text_lib.VOCABULARY
  path.write_bytes(MARK + b'{"corpus": "x", "corpus_sha256": "y"}')
  assert tokenizers.read(path)['corpus'] == 'x'
  learned = bpe.BPE(260)
  learned.fit({'train': TEXT})
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(
    MARK + json.dumps(learned.state_dict()['tokenizer']).encode()
  )
  read = bpe.BPE(file=str(path))
  read.fit({'train': TEXT})
  np.testing.assert_array_equal(read.encode(TEXT), learned.encode(TEXT))
  happened('all three are read')


@pytest.mark.reported('bom')
@fault(
  'a prompt that begins with a byte order mark', 'it is dropped and logged'
)
def test_a_prompt_with_a_mark(tmp_path, caplog, happened):
  caplog.set_level(logging.INFO)
  assert generate._without_mark('\ufeffa\ufeffb') == 'a\ufeffb'
  assert any('mark' in r.getMessage() for r in caplog.records)
  config = config_lib.apply(base.get_config(), [])
  workdir_lib.write_json(tmp_path / 'config.json', config.to_dict())
  line = one_line(generate.generate, tmp_path, ['\ufeff'])
  assert "--prompt=''" in line
  happened('dropped; a prompt of a mark alone is empty')


# A text shorter than a window.


@pytest.mark.reported('short')
@fault(
  'evaluate --data of 9 characters; a window has 16 and a target',
  'the exact loss of what is there: the window is padded, at weight 0',
)
@pytest.mark.slow
def test_a_text_shorter_than_a_window(finished, tmp_path, happened):
  workdir, _ = finished
  path = tmp_path / 'text.txt'
  path.write_text('abcdefghi')
  result = evaluate.evaluate(workdir, 'val', 'best', str(path))
  trained = experiment.restore(workdir_lib.config_of(workdir), workdir, 'best')
  state = trained.params, trained.model_state
  tokens = trained.tokenizer.encode('abcdefghi')
  logits = np.float64(
    trained.task.logits(state, jnp.asarray(tokens[:-1])[None])[0][0]
  )
  chosen = logits[np.arange(8), tokens[1:]]
  nats = np.log(np.exp(logits).sum(axis=1)) - chosen
  assert result['num_tokens'] == 8
  assert result['cross_entropy'] == pytest.approx(nats.mean(), rel=1e-3)
  np.testing.assert_allclose(np.sum(result['expert_load'], axis=1), 1, 1e-5)
  path.write_text('a')
  line = one_line(evaluate.evaluate, workdir, 'val', 'best', str(path))
  assert f'--data={path}: ' in line
  assert '1 of the 2' in line
  happened('equal to a loop; a text of 1 character is one line with its path')


@pytest.mark.reported('short')
@fault(
  'passes over 2, 9 and 17 tokens in windows of 16',
  'each target once, at weight 1; all else is padding, at weight 0',
)
def test_passes_over_few_tokens(happened):
  sizes = {'seed': 0, 'batch_size': 4, 'block_size': 16, 'eval_iters': 0}
  for length in (2, 9, 17):
    tokens = np.arange(1, length + 1)
    (batch,) = Windows({'whole': tokens}, **sizes).eval_batches(
      'whole', slice(0, 4)
    )
    count = length - 1
    for name, values in [
      ('inputs', tokens[:-1]),
      ('targets', tokens[1:]),
      ('weights', np.ones(count)),
    ]:
      assert batch[name].shape == (4, 16)
      np.testing.assert_array_equal(batch[name].ravel()[:count], values)
      assert not batch[name].ravel()[count:].any()
  happened('1, 8 and 16 targets')


@pytest.mark.reported('short')
@fault(
  'a validation split shorter than a window, with eval_iters=0 and without',
  'one pass pads it; sampled windows are refused, with the path of the text',
)
def test_a_short_validation_split(tiny, tmp_path, happened):
  path = tmp_path / 'text.txt'
  path.write_text('ab\n' * 30)
  given = {'data.path': path, 'eval_iters': 0}
  _, _, dataset = text_lib.read(tiny(given), tmp_path)
  (batch,) = dataset.eval_batches('val', slice(0, 4))
  assert batch['weights'].sum() == 8
  line = one_line(text_lib.read, tiny({**given, 'eval_iters': 1}), tmp_path)
  for part in (
    f'data.path={str(path)!r}',
    'val',
    '9 of the 17',
    'block_size=16',
  ):
    assert part in line
  happened(line.replace(str(tmp_path), '...')[:120])


@pytest.mark.reported('short')
@fault(
  'a training split shorter than a window',
  'one line with the path, the split, and how many tokens are needed',
)
def test_a_short_training_split(tiny, tmp_path, happened):
  path = tmp_path / 'text.txt'
  path.write_text('abc\n' * 4)
  config = tiny({'data.path': path, 'eval_iters': 0})
  line = one_line(text_lib.read, config, tmp_path)
  for part in (f'data.path={str(path)!r}', 'train', '14 of the 17'):
    assert part in line
  tokens = {'train': np.arange(17), 'val': np.arange(1)}
  sizes = {'seed': 0, 'batch_size': 4, 'block_size': 16, 'eval_iters': 0}
  assert '1 of the 2' in one_line(Windows, tokens, **sizes)
  happened(line.replace(str(tmp_path), '...')[:120])


# result.json.


@pytest.mark.slow
@pytest.mark.reported('train_ce')
@fault(
  'train_loss has the balance loss, and val_loss has not',
  'train_cross_entropy is beside it, as metrics.jsonl has it',
)
def test_the_cross_entropy_of_training(finished, happened):
  workdir, _ = finished
  result = result_of(workdir)
  last = [m for m in lines_of(workdir) if 'train/loss' in m][-1]
  assert result['train_loss'] == last['train/loss']
  assert result['train_cross_entropy'] == last['train/cross_entropy']
  assert result['train_cross_entropy'] < result['train_loss']
  happened('equal to train/cross_entropy of the last line')


@pytest.mark.reported('train_ce')
@fault(
  "an older version's checkpoint, without train_cross_entropy, is restored",
  'null until the next log, then what that says',
)
def test_a_result_of_an_older_version(happened):
  names = {'train_cross_entropy': 'cross_entropy'}
  result = Result({}, 1, 'cross_entropy', {}, names)
  latest = {'val_loss': 2.0, 'train_loss': 3.0, 'skipped_updates': 1}
  result.load_state_dict({'latest': latest, 'earlier': {}})
  assert result.latest == {**latest, 'train_cross_entropy': None}
  logged = {'loss': 2.5, 'cross_entropy': 2.25}
  metrics = {f'train/{name}': value for name, value in logged.items()}
  result.on_log(None, {**metrics, 'skipped_updates': 1})
  assert result.latest['train_cross_entropy'] == 2.25
  assert result.latest['train_loss'] == 2.5
  happened('null, then 2.25 as logged')
