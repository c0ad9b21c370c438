"""Comparisons of rigged runs: statistics, groups, reasons, tables, pages."""

import csv
import fcntl
import html.parser
import importlib.util
import io
import json
import math
import pathlib
import re
import statistics
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import interpolate, stats

from configs import base
from nanomoe import compare as door
from nanomoe.comparison import page, paired, summary, tables
from nanomoe.comparison.curves import AXES, Curve, equal_point
from nanomoe.planning import estimate
from trainers.errors import UserError

SHA256 = 'ab' * 32
STEPS = (10, 20, 30)
TOKENS = 8 * 32  # Of a batch.
WORK = {
  'num_params': 2000,
  'num_active_params': 1000,
  'flops_per_token': 500.0,
  'active_flops_per_token': 400.0,
  'generation_problem': '',
}
_CONFIG = base.get_config().to_dict()
_FLOATS = st.floats(-1e3, 1e3, allow_subnormal=False)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
  """Stands in for the child processes; the configs that were asked about."""
  configs = []

  def work(config, vocab_size, num_devices=0):
    configs.append(config)
    router = config.moe.router.type
    problem = 'not causal' if router == 'ExpertChoice' else ''
    return {**WORK, 'generation_problem': problem}

  monkeypatch.setattr(estimate, 'work', work)
  return configs


@pytest.fixture
def make(tmp_path):
  """make(name, losses, changes, result) writes a run and returns its path."""

  def write(name, losses=(3.0, 2.0, 1.0), changes=None, result=None, speed=2.0):
    values = {'batch_size': 8, 'block_size': 32, **(changes or {})}
    workdir = tmp_path / name
    workdir.mkdir(parents=True)
    (workdir / 'config.json').write_text(json.dumps(_CONFIG))
    for key, value in values.items():
      _change_config(key, value)(workdir)
    records = []
    for step, loss in zip(STEPS, losses, strict=False):
      records.append({'step': step, 'steps_per_sec': speed})
      bits = {'val/bits_per_byte': loss and 2 * loss}
      records.append({'step': step, 'val/cross_entropy': loss, **bits})
    (workdir / 'metrics.jsonl').write_text(
      ''.join(json.dumps(record) + '\n' for record in records)
    )
    facts = {
      'status': 'done',
      'vocab_size': 65,
      'corpus': 'text',
      'corpus_sha256': SHA256,
      'devices': ['cpu 0'],
      'cpu': 'a CPU, 2 cores',
      'peak_memory_bytes': 10**9,
    }
    (workdir / 'result.json').write_text(
      json.dumps({**facts, **(result or {})})
    )
    return str(workdir)

  return write


@given(
  st.lists(_FLOATS, min_size=2, max_size=8, unique=True).map(sorted),
  st.data(),
)
@settings(deadline=None, max_examples=20)
def test_a_curve_is_linear_between_evaluations_and_ends_with_them(xs, data):
  xs = np.array(xs)
  ys = np.array([data.draw(_FLOATS) for _ in xs])
  expected = interpolate.interp1d(xs, ys, bounds_error=False)
  curve = Curve(xs, ys)
  for x in (*xs, *np.linspace(xs[0] - 1, xs[-1] + 1, 9)):
    np.testing.assert_allclose(curve.at(x), expected(x), rtol=1e-6, atol=1e-6)


def test_the_equal_point_is_the_last_that_all_reached():
  def curve(*positions):
    return Curve(np.array(positions, float), np.zeros(len(positions)))

  assert equal_point([curve(1, 5), curve(2, 9), curve(3, 7)]) == 5
  assert equal_point([curve(1, 5), curve(5, 9)]) == 5
  assert equal_point([curve(1, 5), curve(6, 9)]) is None


@given(st.lists(st.tuples(_FLOATS, _FLOATS), min_size=2, max_size=9))
@settings(deadline=None, max_examples=20)
def test_an_interval_is_that_of_a_paired_t_test(pairs):
  first, second = np.array(pairs).T
  if np.std(second - first) < 1e-6:
    return  # SciPy has no interval without a spread.
  found = paired.difference(dict(enumerate(first)), dict(enumerate(second)))
  expected = stats.ttest_rel(second, first).confidence_interval(0.95)
  np.testing.assert_allclose(found.low, expected.low, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(found.high, expected.high, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(found.mean, np.mean(second - first), atol=1e-9)


def test_only_common_seeds_are_paired():
  found = paired.difference({0: 1.0, 1: 2.0, 5: 9.0}, {1: 2.5, 0: 1.1, 7: 0.0})
  expected = stats.ttest_rel([1.1, 2.5], [1.0, 2.0]).confidence_interval(0.95)
  np.testing.assert_allclose(found[1:3], expected)
  assert found.num_pairs == 2
  one = paired.difference({0: 1.0, 1: 2.0}, {1: 2.5})
  assert (one.mean, one.num_pairs) == (0.5, 1)
  assert math.isnan(one.low)
  assert paired.difference({0: 1.0}, {1: 1.0}).num_pairs == 0


def test_a_spread_is_that_of_a_sample():
  values = [1.0, 2.0, 4.0]
  found = paired.spread(values)
  np.testing.assert_allclose(found.mean, statistics.mean(values))
  np.testing.assert_allclose(found.std, statistics.stdev(values))
  assert math.isnan(paired.spread([1.0]).std)


def test_losses_at_equal_positions(make):
  """The first run has 30 steps of 256 tokens, the second 20 of 512."""
  one = make('one', (3.0, 2.0, 1.0), speed=2.0)
  two = make('two', (3.5, 1.5), {'batch_size': 16}, speed=1.0)
  equal = summary.make([one, two])['equal']
  assert [equal[axis]['point'] for axis in AXES] == [
    20,
    30 * TOKENS,
    30 * TOKENS * 400,
    15.0,  # The first run took 15 s, the second 20 s.
  ]
  losses = {axis: [*equal[axis]['runs'].values()] for axis in AXES}
  assert losses['steps'] == [2.0, 1.5]
  np.testing.assert_allclose(losses['tokens'], [1.0, 2.5])
  np.testing.assert_allclose(losses['flops'], [1.0, 2.5])
  np.testing.assert_allclose(losses['seconds'], [1.0, 2.5])


def test_groups_differ_in_more_than_the_seed(make, asked):
  seeds = [
    make(f'{name}-{seed}', (3, 2, 1 + seed / 10 + more), {'seed': seed, **keys})
    for name, more, keys in (
      ('top', 0.0, {}),
      ('sigmoid', 0.2, {'moe.router.type': 'Sigmoid'}),
    )
    for seed in range(3)
  ]
  value = summary.make(seeds)
  assert value['keys'] == ['moe.router.type']
  assert [group['seeds'] for group in value['groups']] == [[0, 1, 2]] * 2
  assert value['groups'][1]['config'] == {'moe.router.type': 'Sigmoid'}
  steps = value['equal']['steps']
  np.testing.assert_allclose(steps['groups']['A']['mean'], 1.1)
  np.testing.assert_allclose(steps['groups']['A']['std'], 0.1)
  found = steps['differences']['B']
  np.testing.assert_allclose([found['low'], found['high']], 0.2)
  assert found['num_pairs'] == 3
  assert len(asked) == 2  # Seeds share a shape.


def test_seeds_that_start_from_seeds_of_a_source_are_a_group(make):
  sources = [make(f'source-{seed}', (2.0,), {'seed': seed}) for seed in (0, 1)]
  wider = make('wider', (2.0,), {'moe.top_k': 1})
  runs = [
    make(f'run-{seed}', changes={'seed': seed, 'init_from': source})
    for seed, source in enumerate(sources)
  ]
  found = summary.make(runs)
  assert found['keys'] == []
  assert [group['seeds'] for group in found['groups']] == [[0, 1]]
  others = [wider, 'a/run/that/was/removed', '']
  runs += [
    make(f'other-{i}', changes={'init_from': x}) for i, x in enumerate(others)
  ]
  found = summary.make(runs)
  assert found['keys'] == ['init_from']
  assert [group['config']['init_from'] for group in found['groups']] == [
    *(sources[0], *others),
  ]


def test_texts_are_compared_by_content_and_not_by_path(make):
  one = make('one', changes={'data.path': '/a.txt'})
  two = make('two', changes={'data.path': '/b.txt', 'seed': 1})
  value = summary.make([one, two])
  assert value['keys'] == []
  assert len(value['groups']) == 1


def test_files_of_tokenizers_are_compared_by_content(make):
  files = [
    make(x, changes={'data.tokenizer.type': 'BPE', 'data.tokenizer.file': x})
    for x in ('a', 'b', 'c')
  ]
  for path, token in zip(files, 'ttu', strict=True):
    (pathlib.Path(path) / 'vocabulary.json').write_text(
      json.dumps({'tokens': [token], 'corpus': path, 'corpus_sha256': SHA256})
    )
  value = summary.make(files[:2])
  assert (value['keys'], value['unit']) == ([], 'nats per token')
  value = summary.make(files)
  assert value['unit'] == 'bits per byte'
  assert [group['runs'] for group in value['groups']] == [['a', 'b'], ['c']]


def test_bits_per_byte_compare_tokenizers(make):
  runs = make('one'), make('two', changes={'data.tokenizer.type': 'Bytes'})
  value = summary.make(runs)
  assert value['unit'] == 'bits per byte'
  assert value['runs'][0]['loss'] == 2.0  # Twice the nats, as rigged.
  assert any('tokenizers' in line for line in value['remarks'])


def _damage(run):
  path = pathlib.Path(run, 'metrics.jsonl')
  lines = path.read_text().splitlines()
  lines[2] = lines[2][:-5]
  path.write_text('\n'.join(lines) + '\n')


def _write_a_word(run):
  path = pathlib.Path(run, 'metrics.jsonl')
  path.write_text('{"step": 10, "val/cross_entropy": "low"}\n')


def _write_a_list(run):
  path = pathlib.Path(run, 'metrics.jsonl')
  path.write_text('{"step": 10, "val/cross_entropy": [1.0]}\n')


def _write_a_step(run):
  path = pathlib.Path(run, 'metrics.jsonl')
  path.write_text(f'{{"step": {10**30}, "val/cross_entropy": 1.0}}\n')


def _remove_evaluations(run):
  path = pathlib.Path(run, 'metrics.jsonl')
  path.write_text('{"step": 10, "train/loss": 3.0}\n')


def _change_config(key, value):
  def change(run):
    path = pathlib.Path(run, 'config.json')
    values = json.loads(path.read_text())
    *sections, last = key.split('.')
    section = values
    for name in sections:
      section = section[name]
    section[last] = value
    path.write_text(json.dumps(values))

  return change


def _change_result(**changes):
  def change(run):
    path = pathlib.Path(run, 'result.json')
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

  return change


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    (_damage, r'metrics.jsonl, line 3'),
    (_write_a_word, 'metrics.jsonl'),
    (_write_a_list, 'is a list'),
    (_write_a_step, 'metrics.jsonl, line 1'),
    (_remove_evaluations, 'no evaluation'),
    (_change_config('batch_size', 0), r'config.json: batch_size=0'),
    (_change_result(corpus_sha256='cd' * 32), 'cdcdcdcd'),
    (_change_config('data.dataset', {'type': 'my.Data'}), 'my.Data'),
    (_change_config('moe.router', {'type': 'ExpertChoice'}), 'not causal'),
    (_change_config('moe.router', {'type': 'not_mine.X'}), '--allow_imports='),
  ],
)
def test_a_run_that_cannot_be_compared_is_apart(make, change, reason):
  """The wrong run is the first, and prevents nothing."""
  wrong, one, two = make('wrong'), make('one'), make('two')
  change(wrong)
  value = summary.make([wrong, one, two])
  assert [run['name'] for run in value['runs']] == ['one', 'two']
  (apart,) = value['apart']
  assert apart['workdir'] == wrong
  assert reason in apart['reason']
  assert '\n' not in apart['reason']
  with pytest.raises(UserError) as error:  # Only one is left.
    summary.make([wrong, one])
  assert reason in error.value.problems[0]
  assert 'at least two' in error.value.problems[-1]


@pytest.mark.parametrize(
  'changes', [{'cpu': 'another CPU, 2 cores'}, {'devices': ['H100 0']}]
)
def test_seconds_of_another_machine_are_not_compared(make, changes):
  other = make('other', result=changes)
  value = summary.make([other, make('one'), make('two')])
  assert {*value['equal']['seconds']['runs']} == {'one', 'two'}
  assert {*value['equal']['steps']['runs']} == {'other', 'one', 'two'}
  assert value['runs'][0]['curves']['seconds'] is None  # Figures omit it.
  (apart,) = value['apart']
  assert apart['name'] == 'other'
  assert 'seconds' in apart['reason']


def test_a_run_of_an_older_version_is_compared_with_remarks(make):
  """It lacks keys of the config, facts of the result, and speeds."""
  older = pathlib.Path(make('older'))
  values = json.loads((older / 'config.json').read_text())
  del values['upcycle'], values['mesh'], values['model']['scan_layers']
  (older / 'config.json').write_text(json.dumps(values))
  (older / 'result.json').write_text('{"status": "done", "vocab_size": 65}')
  (older / 'metrics.jsonl').write_text(
    '{"step": 30, "val/cross_entropy": 1.5}\n'
  )
  value = summary.make([str(older), make('one'), make('two')])
  assert len(value['runs']) == 3
  assert value['keys'] == []
  assert value['equal']['steps']['runs']['older'] == 1.5
  assert {*value['equal']['seconds']['runs']} == {'one', 'two'}
  assert any('older' in line and 'text' in line for line in value['remarks'])
  tables.render(value, 'text')


def test_a_run_without_a_cpu_does_not_decide_the_machine(make):
  runs = [
    make('old', result={'cpu': ''}),
    make('older', result={'cpu': ''}),
    make('one'),
    make('other', result={'cpu': 'another CPU, 2 cores'}),
  ]
  value = summary.make(runs)
  assert [x['name'] for x in value['apart']] == ['other']


def test_a_vocabulary_of_an_older_version_has_no_type(make):
  paths = make('old'), make('new')
  for path, state in zip(paths, ({}, {'type': 'Characters'}), strict=True):
    state |= {'characters': 'ab', 'corpus': path, 'corpus_sha256': SHA256}
    (pathlib.Path(path) / 'vocabulary.json').write_text(json.dumps(state))
  value = summary.make(paths)
  assert value['unit'] == 'nats per token'


def test_a_run_in_progress_is_compared_up_to_its_last_evaluation(make):
  running = make('running', (3.0, 2.5), result={'status': 'running'})
  runs = [running, make('one')]
  with open(f'{running}/log.txt', 'w') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    value = summary.make(runs)
  assert value['equal']['steps']['point'] == 20
  assert value['equal']['steps']['runs'] == {'running': 2.5, 'one': 2.0}
  assert [run['status'] for run in value['runs']] == ['running', 'done']
  assert value['runs'][0]['peak_memory_bytes'] is None
  assert any('running' in line for line in value['remarks'])
  assert summary.make(runs)['runs'][0]['status'] == 'killed'


def test_a_loss_that_was_not_finite_ends_a_curve(make):
  value = summary.make([make('bad', (3.0, None, 1.0)), make('one')])
  assert value['equal']['steps']['point'] == 10
  assert any('step 20' in line for line in value['remarks'])
  # What followed is no result of the run.
  bad = value['runs'][0]
  assert (bad['loss'], bad['best_loss'], bad['evaluated_step']) == (3, 3, 10)
  with pytest.raises(UserError, match='not finite'):
    summary.make([make('worse', (None, 2.0)), make('two')])


def test_runs_without_a_common_position_have_no_loss(make):
  late = make('late')
  pathlib.Path(late, 'metrics.jsonl').write_text(
    '{"step": 40, "val/cross_entropy": 1.5}\n'
  )
  value = summary.make([make('one'), late])
  assert value['equal']['steps']['point'] is None
  assert 'late' in value['equal']['steps']['reason']
  assert value['equal']['steps']['reason'] in ' '.join(
    tables.render(value, 'md').split()
  )


def test_a_run_that_ended_early_does_not_hide_the_others(make):
  short, runs = make('short', (3.0,)), [make('one'), make('two')]
  for run in runs:
    path = pathlib.Path(run, 'metrics.jsonl')
    lines = path.read_text().splitlines()
    path.write_text('\n'.join(lines[2:]))  # The first evaluation is later.
  value = summary.make([short, *runs])
  assert value['equal']['steps']['point'] == 30
  (apart,) = value['apart']
  assert apart['name'] == 'short'
  assert 'step 10' in apart['reason']


@pytest.mark.parametrize(
  ('changes', 'losses', 'part'),
  [
    ({'eval_iters': 7}, (3.0, 2.0, 1.0), 'differ in eval_iters'),
    ({'block_size': 16}, (3.0, 2.0, 1.0), 'differ in block_size'),
    ({'moe.top_k': 1}, (3.0,), 'limits equal steps to 10'),
    ({'log_interval': 9, 'seed': 1}, (3.0, 2.0, 1.0), 'of one seed'),
  ],
)
def test_what_makes_a_comparison_weak_is_a_remark(make, changes, losses, part):
  seed = {'seed': 1}
  runs = [make('one', changes=seed), make('more', losses, {**seed, **changes})]
  runs.append(make('two', changes=seed))
  if 'of one seed' not in part:
    runs[-1] = make('other', changes={'seed': 2})
  found = summary.make(runs)['remarks']
  assert any(part in line for line in found), found
  assert not any(
    part in line for line in summary.make([runs[0], make('like')])['remarks']
  )


def test_a_missing_vocabulary_does_not_change_the_unit(make):
  runs = make('one'), make('two'), make('three')
  for path in runs[:2]:
    state = {'type': 'Characters', 'characters': 'ab', 'corpus': 'text'}
    state['corpus_sha256'] = SHA256
    (pathlib.Path(path) / 'vocabulary.json').write_text(json.dumps(state))
  value = summary.make(runs)
  assert value['unit'] == 'nats per token'
  (line,) = [x for x in value['remarks'] if 'vocabulary' in x]
  assert line.startswith('three: ')
  _change_config('data.tokenizer.type', 'Bytes')(runs[2])
  assert summary.make(runs)['unit'] == 'bits per byte'


def test_the_vocabulary_tells_the_text_of_a_run_without_a_result(make):
  runs = make('one'), make('two'), make('three')
  state = {'type': 'Characters', 'characters': 'ab', 'corpus': 'another'}
  state['corpus_sha256'] = 'cd' * 32
  (pathlib.Path(runs[2]) / 'vocabulary.json').write_text(json.dumps(state))
  pathlib.Path(runs[2], 'result.json').unlink()
  (apart,) = summary.make(runs)['apart']
  assert apart['name'] == 'three'
  assert 'another text: another, sha256 cdcdcdcd' in apart['reason']


def test_runs_that_are_not_causal_do_not_decide_the_text(make):
  apart = {'moe.router': {'type': 'ExpertChoice'}}
  other = {'corpus_sha256': 'cd' * 32}
  runs = [make(f'choice{i}', changes=apart, result=other) for i in range(3)]
  value = summary.make([*runs, make('one'), make('two')])
  assert [run['name'] for run in value['runs']] == ['one', 'two']


def test_one_run_of_each_machine_has_no_equal_seconds(make):
  value = summary.make([make('one'), make('two', result={'cpu': 'another'})])
  assert 'one machine' in value['equal']['seconds']['reason']
  value = summary.make([make('a'), make('b', result={'devices': None})])
  assert value['equal']['steps']['point'] == 30


def test_equal_numbers_are_one_group(make):
  changes = [{'moe.z_weight': x} for x in (1, 1.0, 2.0)]
  runs = [make(f'run{i}', changes=x) for i, x in enumerate(changes)]
  groups = summary.make(runs)['groups']
  assert [group['runs'] for group in groups] == [['run0', 'run1'], ['run2']]


def test_directories_and_patterns_name_runs(make, tmp_path):
  for name in ('sweep/lr=1', 'sweep/lr=2', 'more/b', 'more/a'):
    make(name)
  (tmp_path / 'more' / 'notes.txt').write_text('none')
  words = [str(tmp_path / 'sweep'), str(tmp_path / 'more' / '*')]
  words.append(str(tmp_path / 'more' / 'a'))  # Named twice.
  value = summary.make(words)
  names = [run['name'] for run in value['runs']]
  assert names == ['lr=1', 'lr=2', 'a', 'b']


def test_each_argument_without_a_run_has_a_line(make, tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').write_text('')
  wrong = [str(tmp_path / name) for name in ('missing', 'empty', 'file', 'x*')]
  with pytest.raises(UserError) as error:
    summary.make([make('one'), *wrong])
  assert len(error.value.problems) == 4
  for word, line in zip(wrong, error.value.problems, strict=True):
    assert line.startswith(f'RUN={word}: ')


def test_outputs_are_checked_first(make, tmp_path):
  runs = [make('one'), make('two')]
  for key in ('html', 'plot'):
    with pytest.raises(UserError, match=f'--{key}='):
      door.compare(runs, **{key: tmp_path / 'missing' / 'x.png'})
  with pytest.raises(UserError, match=r'--plot=.*\.svg'):
    door.compare(runs, plot=tmp_path / 'x.pdf')
  with pytest.raises(UserError, match='RUN'):
    door.compare([])
  config = pathlib.Path(runs[0], 'config.json')
  for path in (config, '/dev/null'):
    with pytest.raises(UserError, match='--html='):
      door.compare(runs, html=path)
  assert json.loads(config.read_text())


@pytest.fixture
def value(make):
  """A comparison of three groups, one without a common seed."""
  for name, keys in (
    ('a-0', {'seed': 0}),
    ('a-1', {'seed': 1}),
    ('b-0', {'seed': 0, 'moe.top_k': 1}),
    ('b-1', {'seed': 1, 'moe.top_k': 1}),
    ('<c|d>', {'seed': 7, 'moe.top_k': 3}),
  ):
    make(name, (3.0, 2.0, 1 + keys['seed'] / 9 + len(keys) / 7), keys)
  wrong = make('wrong')
  _remove_evaluations(wrong)
  return summary.make([f'{wrong}/../a-*', f'{wrong}/..'])


def test_the_table_fits_a_terminal(value):
  lines = tables.render(value, 'text', 80).splitlines()
  assert max(map(len, lines)) <= 80
  text = '\n'.join(lines)
  assert "Student's t" in ' '.join(text.split())
  for words in ('moe.top_k', 'a-0', '<c|d>', 'no evaluation'):
    assert words in text
  (difference,) = [x for x in lines if x.startswith('B - A')][:1]
  assert 'none' in difference  # Groups without a common seed.


def test_markdown_has_as_many_cells_in_each_row(value):
  text = tables.render(value, 'md')
  assert '&lt;c\\|d&gt;' in text
  for part in text.split('### ')[1:]:
    rows = [line for line in part.splitlines() if line.startswith('|')]
    cells = {row.replace('\\|', '').count('|') for row in rows}
    assert len(cells) == 1, part


def test_csv_and_json_have_each_run(value):
  rows = list(csv.DictReader(io.StringIO(tables.render(value, 'csv'))))
  assert [row['name'] for row in rows] == [r['name'] for r in value['runs']]
  assert [row['moe.top_k'] for row in rows] == ['2', '2', '3', '1', '1']
  for row, run in zip(rows, value['runs'], strict=True):
    assert float(row['loss_at_equal_steps']) == run['equal']['steps']
  assert json.loads(tables.render(value, 'json')) == value


class _Page(html.parser.HTMLParser):
  """Parser that checks that tags are closed, and collects attributes."""

  VOID = ('meta', 'line', 'circle')

  def __init__(self, text):
    super().__init__()
    self.open, self.attributes, self.text = [], [], ''
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attributes += attrs

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_page_is_well_formed_and_works_offline(value):
  text = page.render(value)
  parsed = _Page(text)
  names = {name for name, _ in parsed.attributes}
  assert not names & {'src', 'href', 'xlink:href', 'srcset'}
  for word in ('http:', 'https:', 'url(', '@import', '<script'):
    assert word not in text
  for words in ('<c|d>', 'moe.top_k=1', 'no evaluation', 'prefers-color'):
    assert words in parsed.text
  assert text.count('<figure>') == len(AXES)
  assert text.count('<polyline') == len(AXES) * len(value['runs'])


def test_points_of_the_page_are_inside_the_figure(make):
  """Equal losses and a single evaluation have a figure too."""
  runs = [make('one', (2.0,)), make('two', (2.0,))]
  for name, text in _Page(page.render(summary.make(runs))).attributes:
    if name in ('cx', 'cy'):
      assert 0 <= float(text) <= 420


def test_many_groups_have_names_of_their_own():
  names = [summary._letter(index) for index in range(80)]
  assert names[:2] == ['A', 'B']
  assert names[26] == 'A2'
  assert len({*names}) == 80


def test_many_groups_of_a_figure_have_lines_of_their_own(make, tmp_path):
  path = tmp_path / 'figure.svg'
  sources = [f'$x_{i}$ $y$' for i in range(9)]  # No formulas.
  runs = [
    make(f'run{i}', changes={'init_from': source})
    for i, source in enumerate(sources)
  ]
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    door.compare(runs, plot=path)
  # Lines of the legend have a width of their own.
  found = re.findall('style="([^"]*stroke-width: 1.5[^"]*)"', path.read_text())
  assert len({*found}) == len(found) == 9


@pytest.mark.parametrize('suffix', ['.png', '.svg'])
def test_a_figure_is_written(make, tmp_path, suffix):
  path = tmp_path / f'figure{suffix}'
  door.compare([make('one'), make('two', changes={'seed': 1})], plot=path)
  start = b'\x89PNG' if suffix == '.png' else b'<?xml'
  assert path.read_bytes().startswith(start)


def test_a_missing_matplotlib_is_named(make, tmp_path, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name: None if name == 'matplotlib' else find_spec(name),
  )
  with pytest.raises(UserError, match=r'nanomoe\[plot\]'):
    door.compare([make('one'), make('two')], plot=tmp_path / 'figure.png')
