"""What TensorBoard shows of real runs: its reader's view, and its server's."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import types
import urllib.error
import urllib.parse
import urllib.request

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from configs import base
from nanomoe import experiment
from nanomoe.callbacks import TextSample
from nanomoe.callbacks.expert_loads import draw
from nanomoe.config import overrides as config_lib
from nanomoe.data.tokenizers import Characters
from nanomoe.model.decode_cache import DecodeCache
from tests.shrunk import ROOT, TINY
from trainers.runtime.clock import Clock

NUM_LAYERS, NUM_EXPERTS = 2, 4
WEIGHTED = {
  f'loss/weighted_{name}' for name in ('aux_loss', 'z_loss', 'router_entropy')
}
BY_LAYER = (
  'co_activation',
  'dead_experts',
  'dropped_fraction',
  'first_gate',
  'load_entropy',
  'max_over_mean_load',
  'max_vio',
  'router_entropy',
)
PICTURES = {
  'train': {'routing/load_history': 'images'},
  'val': {
    'routing/specialization': 'images',
    'routing/specialization/tokens': 'text',
    'routing/co_activation': 'images',
  },
}
EVALUATED, LOGGED = [4, 8, 12], [2, 4, 6, 8, 10, 12]


# Read back.


class Events:
  """The event files of a directory."""

  def __init__(self, directory):
    self._events = plugin_event_accumulator.EventAccumulator(str(directory))
    self._events.Reload()
    self.kinds = {
      tag: self._events.SummaryMetadata(tag).plugin_data.plugin_name
      for tag in self._events.Tags()['tensors']
    }

  def steps(self, tag):
    return [event.step for event in self._events.Tensors(tag)]

  def values(self, tag):
    tensors = self._events.Tensors(tag)
    return [tensor_util.make_ndarray(t.tensor_proto) for t in tensors]


def recorded(workdir, key):
  """{step: value} in metrics.jsonl."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line[key] for line in lines if key in line}


@pytest.mark.parametrize(
  ('split', 'steps', 'only'),
  [
    ('train', LOGGED, {'loss/total', 'routing/aux_weight', *WEIGHTED}),
    ('val', EVALUATED, {'loss/best_cross_entropy', 'loss/prediction_entropy'}),
  ],
)
def test_a_split_has_every_chart(finished, split, steps, only):
  workdir, _ = finished
  events = Events(workdir / split)
  layers = range(NUM_LAYERS)
  scalars = only | {'loss/cross_entropy', 'loss/bits_per_char'}
  scalars |= {'loss/bits_per_byte', 'routing/aux_loss', 'routing/z_loss'}
  scalars |= {f'routing/{name}/{i}' for name in BY_LAYER for i in layers}
  histograms = {f'routing/expert_load/{i}' for i in layers}
  kinds = {**dict.fromkeys(scalars, 'scalars')}
  kinds |= dict.fromkeys(histograms, 'histograms')
  kinds |= {'routing/expert_load': 'images'}
  for tag, kind in kinds.items():
    assert events.kinds.pop(tag) == kind
    assert events.steps(tag) == steps, tag
  for tag, kind in PICTURES[split].items():
    assert events.kinds.pop(tag) == kind
    assert events.steps(tag) == EVALUATED, tag
  session = {f'_hparams_/session_{end}_info' for end in ('start', 'end')}
  assert set(events.kinds) == (session if split == 'val' else set())


def test_values_are_those_of_the_metrics(finished):
  workdir, _ = finished
  for split in ('train', 'val'):
    events = Events(workdir / split)
    for tag, name in {
      'loss/cross_entropy': 'cross_entropy',
      'routing/aux_loss': 'aux_loss',
    }.items():
      written = list(recorded(workdir, f'{split}/{name}').values())
      np.testing.assert_allclose(events.values(tag), written, rtol=1e-6)
    loads = list(recorded(workdir, f'{split}/expert_load').values())
    for name in ('router_entropy', 'max_over_mean_load'):
      vectors = np.array(list(recorded(workdir, f'{split}/{name}').values()))
      for i in range(NUM_LAYERS):
        found = events.values(f'routing/{name}/{i}')
        np.testing.assert_allclose(found, vectors[:, i], rtol=1e-6)
    np.testing.assert_allclose(
      vectors, NUM_EXPERTS * np.max(loads, axis=-1), rtol=1e-5
    )
    for i in range(NUM_LAYERS):
      rows = events.values(f'routing/expert_load/{i}')[-1]
      assert rows[:, 2].sum() == NUM_EXPERTS
      assert rows[0, 0] <= np.min(loads[-1][i]) <= np.max(loads[-1][i])
      assert rows[-1, 1] == pytest.approx(np.max(loads[-1][i]))


def test_the_rest_is_in_the_directory_of_the_run(finished):
  workdir, _ = finished
  events = Events(workdir)
  kinds = {
    'optimizer/learning_rate': 'scalars',
    'optimizer/gradient_norm': 'scalars',
    'optimizer/skipped_updates': 'scalars',
    'speed/steps_per_sec': 'scalars',
    'speed/tokens_per_sec': 'scalars',
    'routing/alarms': 'scalars',
    'sample': 'text',
    'custom_scalars__config__': 'custom_scalars',
  }
  assert events.kinds == kinds
  assert events.steps('optimizer/learning_rate') == LOGGED
  assert events.steps('sample') == [5, 10, 12]
  [text] = events.values('sample')[-1]
  shown = [line[4:] for line in text.decode().split('\n')[:-1]]
  assert '\n'.join(shown) == (workdir / 'sample.txt').read_text()


# Samples.


class Texts(types.SimpleNamespace):
  """What TextSample uses of a trainer; `steps` have a text."""

  def __init__(self):
    state = types.SimpleNamespace(model_state={})
    super().__init__(step=0, num_train_steps=9, status='running', state=state)
    self.is_first = True
    self.eval_params = jnp.ones(())
    self.writer, self.clock, self.steps = self, Clock(), []

  def write_texts(self, step, texts):
    assert texts['sample'].startswith('    ')
    self.steps.append(step)

  def flush(self):
    pass

  def poll(self):
    pass


@pytest.mark.parametrize(
  ('every_steps', 'end', 'expected'),
  [
    (4, (9, 'running'), [4, 8, 9]),
    (0, (9, 'running'), [9]),
    (4, (6, 'done'), [4, 6]),  # It stopped early.
    (4, (8, 'diverged'), [4]),
  ],
)
def test_samples_are_at_their_steps_and_compiled_once(
  tmp_path, every_steps, end, expected
):
  traces = []

  def logits(trained, tokens, cache=None, length=None):
    traces.append(tokens.shape)
    rows, time = tokens.shape
    window, length = jnp.zeros((rows, 8), jnp.int32), jnp.zeros(rows, jnp.int32)
    cache = DecodeCache(window, length, blocks=())
    return trained[0] * jnp.zeros((rows, time, 3)), cache

  tokenizer = Characters()
  tokenizer.fit({'train': 'a\nb'})
  callback = TextSample(
    logits,
    tmp_path / 'sample.txt',
    tokenizer,
    prompt=[0],
    block_size=8,
    every_steps=every_steps,
    num_tokens=20,
    temperature=1.0,
    seed=0,
  )
  loop = Texts()
  for loop.step in range(1, end[0] + 1):
    if loop.step == end[0]:
      loop.status = end[1]
    callback.on_train_step_end(loop)
  assert loop.steps == expected
  assert traces == [(1, 8), (1, 1)]
  assert (tmp_path / 'sample.txt').exists() == (end[1] != 'diverged')
  assert loop.clock.seconds['sample'] > 0


# The picture.


@pytest.mark.parametrize('shape', [(1, 1), (2, 4), (4, 64), (64, 8), (12, 128)])
def test_cells_are_visible_and_bytes_few(shape, tmp_path):
  load = np.random.default_rng(0).dirichlet(np.ones(shape[1]), shape[0])
  image = draw(load)
  height, width = image.shape[0] // shape[0], image.shape[1] // shape[1]
  assert min(height, width) >= 4
  assert image.shape[0] <= 600 and image.shape[1] <= 600
  centers = image[height // 2 :: height, width // 2 :: width]
  assert centers.shape == (*shape, 3)
  relative = load * shape[1]
  red, blue = centers[..., 0].astype(int), centers[..., 2].astype(int)
  assert (red > blue)[relative > 1.1].all()
  assert (red < blue)[relative < 0.9].all()


def test_colors_are_of_the_load_over_the_mean():
  load = np.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
  image = draw(load)
  height, width = image.shape[0] // 2, image.shape[1] // 4
  equal, (most, *idle) = image[height // 2 :: height, width // 2 :: width]
  assert (equal == equal[0]).all()
  assert equal[0].min() > 240
  assert most[0] > 150 > most[2] and all(c[2] > 150 > c[0] for c in idle)
  assert draw(np.full((2, 4), np.nan)).shape == image.shape


# Served.


@pytest.fixture(scope='module')
def logdir(finished, tmp_path_factory):
  """Two runs: base.py's, and one with a key that the other has not."""
  directory = tmp_path_factory.mktemp('logdir')
  shutil.copytree(
    finished[0],
    directory / 'first',
    ignore=shutil.ignore_patterns('checkpoints'),
  )
  trained = json.loads((finished[0] / 'config.json').read_text())
  changes = {
    **TINY,
    # Another worker may have trained the first run, on its copy of the text.
    'data.path': trained['data']['path'],
    'model.num_layers': 1,
    'optimizer.learning_rate': 0.01,
    'callbacks.profile.num_steps': 2,
    'callbacks.other.type': 'EarlyStopping',
    'callbacks.other.patience': 7,
  }
  config = config_lib.apply(
    base.get_config(), [(k, str(v)) for k, v in changes.items()]
  )
  (directory / 'second').mkdir()
  assert experiment.build(config, directory / 'second').fit() == 'done'
  return directory


@pytest.fixture(scope='module')
def ask(logdir):
  """ask(path, body=None, **query) -> what TensorBoard's server answers."""
  words = [sys.executable, '-m', 'tensorboard.main', '--port=0']
  process = subprocess.Popen(
    [*words, f'--logdir={logdir}'],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stderr
  for line in process.stderr:
    if found := re.search(r'http://\S+:\d+', line):
      break
  else:
    raise AssertionError('TensorBoard did not start')
  address = found.group().replace('0.0.0.0', 'localhost')

  # It is here, whatever proxy there is.
  opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

  def get(path, body=None, **query):
    url = f'{address}/data/{path}?{urllib.parse.urlencode(query)}'
    request = urllib.request.Request(
      url,
      data=None if body is None else json.dumps(body).encode(),
      headers={'Content-Type': 'application/json'},
    )
    with opener.open(request, timeout=20) as response:
      content = response.read()
      kind = response.headers['Content-Type']
    return json.loads(content) if 'json' in kind else content

  end = time.monotonic() + 30
  tag = 'loss/cross_entropy'
  while not all(  # It reads the files while it serves.
    tag in get('plugin/scalars/tags').get(f'{run}/val', {})
    for run in ('first', 'second')
  ):
    assert time.monotonic() < end
    time.sleep(0.1)
  yield get
  process.terminate()
  process.stderr.close()
  process.wait()


@pytest.mark.slow
def test_runs_are_overlaid(ask):
  assert set(ask('runs')) == {
    f'{run}{split}'
    for run in ('first', 'second')
    for split in ('', '/train', '/val')
  }
  tags = ask('plugin/scalars/tags')
  for run in ('first', 'second'):
    assert 'loss/cross_entropy' in tags[f'{run}/train']
    assert 'loss/cross_entropy' in tags[f'{run}/val']
    assert 'optimizer/learning_rate' in tags[run]
    points = ask(
      'plugin/scalars/scalars', run=f'{run}/val', tag='loss/cross_entropy'
    )
    assert [step for _, step, _ in points] == EVALUATED


def test_histograms_images_and_texts_are_served(ask, logdir):
  where = {'run': 'second/val', 'tag': 'routing/expert_load/0'}
  histograms = ask('plugin/histograms/histograms', **where)
  assert [step for _, step, _ in histograms] == EVALUATED
  where['tag'] = 'routing/expert_load'
  images = ask('plugin/images/images', sample=0, **where)
  assert [image['step'] for image in images] == EVALUATED
  load = recorded(logdir / 'second', 'val/expert_load')[12]
  heat_map = draw(np.array(load))
  key = dict(urllib.parse.parse_qsl(images[-1]['query']))
  png = ask('plugin/images/individualImage', **key)
  shown = np.asarray(Image.open(io.BytesIO(png)))
  height, width, _ = heat_map.shape
  np.testing.assert_array_equal(shown[-height:, -width:], heat_map)
  labels = shown[:-height], shown[-height:, :-width]
  assert all((part < 128).any() for part in labels)
  assert len(png) < 4000
  texts = ask('plugin/text/text', run='second', tag='sample')
  assert {text['step'] for text in texts} == {5, 10, 12}
  assert all('<code>' in text['text'] for text in texts)


def test_runs_sort_by_validation_loss(ask, logdir):
  experiment = ask('plugin/hparams/experiment', body={})
  differs = {
    info['name'] for info in experiment['hparamInfos'] if info['differs']
  }
  assert differs == {
    'model.num_layers',
    'optimizer.learning_rate',
    'callbacks.profile.num_steps',
  }
  names = {info['name'] for info in experiment['hparamInfos']}
  assert names >= {'callbacks.other.patience', 'moe.top_k', 'moe.router.type'}
  metrics = {info['name']['tag'] for info in experiment['metricInfos']}
  assert metrics >= {'loss/cross_entropy', 'loss/best_cross_entropy'}
  for tag, name in (
    ('loss/cross_entropy', 'val/cross_entropy'),
    ('loss/best_cross_entropy', 'val/best_cross_entropy'),
  ):
    last = {
      f'{run}/val': recorded(logdir / run, name)[12]
      for run in ('first', 'second')
    }
    for order, reverse in (('ORDER_ASC', False), ('ORDER_DESC', True)):
      metric = {'metric': {'tag': tag, 'group': ''}, 'order': order}
      groups = ask(
        'plugin/hparams/session_groups',
        body={
          'colParams': [metric],
          'allowedStatuses': ['STATUS_SUCCESS'],
          'sliceSize': 9,
        },
      )['sessionGroups']
      found = [group['name'] for group in groups]
      assert found == sorted(last, key=last.get, reverse=reverse)
      for group in groups:
        values = {v['name']['tag']: v['value'] for v in group['metricValues']}
        assert values[tag] == pytest.approx(last[group['name']], rel=1e-6)
  rates = {
    group['name']: group['hparams']['optimizer.learning_rate']
    for group in groups
  }
  assert rates == {'first/val': 3e-4, 'second/val': 0.01}


def test_the_layout_opens_on_what_matters(ask):
  layout = ask('plugin/custom_scalars/layout')
  titles = [category['title'] for category in layout['category']]
  assert titles == ['loss', 'routing', 'optimizer', 'speed']
  tags = {tag for tags in ask('plugin/scalars/tags').values() for tag in tags}
  for category in layout['category']:
    for chart in category['chart']:
      [regex] = chart['multiline']['tag']
      assert any(re.match(regex, tag) for tag in tags), chart
  series = ask(
    'plugin/custom_scalars/scalars',
    run='first/val',
    tag=layout['category'][0]['chart'][0]['multiline']['tag'][0],
  )
  assert list(series['tag_to_events']) == ['loss/cross_entropy']


def test_a_profile_is_where_its_plug_in_looks(logdir):
  assert not (logdir / 'first' / 'plugins').exists()
  [trace] = (logdir / 'second').glob('plugins/profile/*/*.xplane.pb')
  assert trace.stat().st_size > 1000
