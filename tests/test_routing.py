"""The command `routing`: its page, its JSON, and its one-line errors."""

import fcntl
import json
import shutil

import numpy as np
import pytest

from nanomoe import experiment, routing
from trainers.errors import UserError


@pytest.fixture(scope='module')
def trained(finished):
  """Returns the workdir of the tiny run, and its figures."""
  workdir, _ = finished
  return workdir, routing.routing(workdir, num_tokens=100)


def test_page_and_json_are_in_the_workdir(trained):
  workdir, values = trained
  assert json.loads((workdir / 'routing.json').read_text()) == values
  html = (workdir / 'routing.html').read_text()
  literal = html.partition('id="data">')[2].partition('</script>')[0]
  assert json.loads(literal) == values
  assert values['about']['num_tokens'] == 100
  assert values['about']['step'] == 12
  names = {'text', 'loads', 'specialization_token', 'specialization_position'}
  names |= {'coactivation', 'saturation', 'predictability', 'load_history'}
  assert set(values['figures']) >= names
  for figure in values['figures'].values():
    assert figure['layers'] == [0, 1]
    assert figure['split'] in ('val', 'train')


def test_loads_are_counts_of_the_text(trained, corpus):
  workdir, values = trained
  text = values['figures']['text']
  assert ''.join(text['pieces']) == corpus.read_text()[4500:4600]
  for layer, choices in enumerate(text['choices']):
    counts = np.bincount(np.ravel(choices), minlength=4)
    share = values['figures']['loads']['share'][layer]
    np.testing.assert_allclose(counts / 200, share, atol=1e-3)
  # Base.py's weights of a token add up to 1.
  assert np.abs(np.sum(text['percent'], axis=2) - 100).max() <= 1
  saved = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
  assert values['figures']['saturation']['steps'] == saved[:-1]


def test_texts_are_labels_and_an_unknown_character_is_named(trained, tmp_path):
  workdir, _ = trained
  paths = [tmp_path / 'a.txt', tmp_path / 'b.txt']
  for path, text in zip(paths, ('abcabc' * 9, 'hello\n' * 9), strict=True):
    path.write_text(text)
  out = tmp_path / 'page.html'
  values = routing.routing(workdir, paths, out, step=12)
  assert values['figures']['specialization_text']['labels'] == [
    *map(str, paths)
  ]
  assert out.exists() and out.with_suffix('.json').exists()
  # Characters behind the last token need no tokens.
  paths[1].write_text('ab\n' * 3 + 'ZZ')
  words = [f'one={paths[0]}', f'two={paths[1]}', f'one={paths[1]}']
  values = routing.routing(workdir, words, out, num_tokens=9)
  assert [(x['name'], x['num_tokens']) for x in values['about']['texts']] == [
    ('one', 18),
    ('two', 9),
  ]
  text = values['figures']['text']
  assert ''.join(text['pieces']) == 'abcabcabc' + 'ab\n' * 6
  paths[1].write_text('ZZ')
  with pytest.raises(UserError, match=r'--text=.*b.txt: .*Z') as error:
    routing.routing(workdir, paths, out)
  assert len(error.value.problems) == 1


@pytest.mark.slow
def test_a_run_in_progress_and_damaged_checkpoints(trained, tmp_path):
  """The newest intact checkpoint is used; without one, an error is raised."""
  workdir = tmp_path / 'copy'
  shutil.copytree(trained[0], workdir)
  with (workdir / 'log.txt').open('a') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    steps = sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())
    _damage(workdir / 'checkpoints' / str(steps[-1]))
    values = routing.routing(workdir, num_tokens=50)
  assert values['about']['is_running']
  assert values['about']['step'] == steps[-2]
  for step in steps:
    _damage(workdir / 'checkpoints' / str(step))
  with pytest.raises(UserError, match='damaged'):
    routing.routing(workdir, num_tokens=50)


def _damage(checkpoint):
  for path in checkpoint.rglob('*'):
    if path.is_file():
      path.write_bytes(b'x')


@pytest.mark.parametrize(
  ('arguments', 'line'),
  [
    ({'workdir': 'nowhere'}, '--workdir=nowhere'),
    ({'out': 'page.txt'}, '--out=page.txt'),
    ({'out': 'nowhere/page.html'}, '--out=nowhere'),
    ({'texts': ['nowhere.txt']}, "--text='nowhere.txt'"),
    ({'num_tokens': 0}, '--num_tokens=0'),
    ({'step': 77}, '--step=77'),
    ({'texts': [f'{i}=BUILD.md' for i in range(21)]}, '--text: over 20 labels'),
    ({'texts': ['one=nowhere.txt']}, "--text='nowhere.txt'"),
  ],
)
def test_a_mistake_has_one_line(trained, arguments, line):
  with pytest.raises(UserError) as error:
    routing.routing(**{'workdir': trained[0], **arguments})
  (found,) = error.value.problems
  assert found.startswith(line)


def test_a_page_replaces_no_file_of_the_run(trained):
  before = (trained[0] / 'result.json').read_text()
  with pytest.raises(UserError, match=r'result\.json is another file'):
    routing.routing(trained[0], out=trained[0] / 'result.html')
  assert (trained[0] / 'result.json').read_text() == before


def test_a_damaged_record_is_named(trained, tmp_path):
  for path in ('config.json', 'vocabulary.json'):
    shutil.copy(trained[0] / path, tmp_path)
  (tmp_path / 'metrics.jsonl').write_text('nonsense\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl, line 1'):
    routing.routing(tmp_path)


def test_a_run_without_experts_has_one_line(tiny, tmp_path):
  config = tiny({'moe.first_dense_layers': 2})
  experiment.build(config, tmp_path)
  with pytest.raises(UserError, match='no layer of the model has experts'):
    routing.routing(tmp_path)
