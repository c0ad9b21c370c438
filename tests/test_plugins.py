"""The examples of docs/plugins.md, as printed there, in one real run."""

import csv
import json
import os
import re
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import experiment, optimizers, sampling
from nanomoe.config import overrides as config_lib
from nanomoe.config import schema
from nanomoe.data import pipeline as text_lib
from nanomoe.data import tokenizers
from tests.routed import QUICKLY
from tests.shrunk import ROOT
from trainers.errors import UserError

DOCS = (ROOT / 'docs' / 'plugins.md').read_text()
OPTIONS = [
  word
  for line in re.findall(r'^    (--config\..*)$', DOCS, re.MULTILINE)
  for word in shlex.split(line)
]
SECTIONS = {
  'model.attention',
  'moe.router',
  'data.dataset',
  'data.tokenizer',
  'optimizer',
  'callbacks.alarm',
  'writers.csv',
}

# A router with five positional arguments, as older versions called it.
OLD_ROUTER = """
from flax import linen as nn


class Old(nn.Module):

  @nn.compact
  def __call__(self, x, tokens, mask, bias, train):
    raise AssertionError('never called')
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Directory with the files of the examples."""
  directory = tmp_path_factory.mktemp('plugins')
  blocks = re.findall(r'```python\n# (\w+\.py)\n(.*?)```', DOCS, re.DOTALL)
  assert len(blocks) == len(SECTIONS)
  blocks.append(('my_old_router.py', OLD_ROUTER))
  for name, code in blocks:
    (directory / name).write_text(code)
  return directory


@pytest.fixture
def importable(files, monkeypatch):
  monkeypatch.syspath_prepend(files)


def test_there_is_an_example_of_each():
  _, overrides = config_lib.split_arguments(OPTIONS)
  typed = {key.removesuffix('.type') for key, _ in overrides if 'type' in key}
  assert typed == SECTIONS
  groups = {section.split('.')[0] for section in SECTIONS}
  assert groups >= set(schema.SPEC_GROUPS)


@pytest.mark.slow
def test_all_of_them_in_a_run_that_is_resumed(files, command, run, tmp_path):
  workdir = tmp_path / 'run'
  environment = {**os.environ, 'PYTHONPATH': str(files)}
  words = command(
    f'--workdir={workdir}', *OPTIONS, changes={'num_train_steps': 8}
  )
  process = run(words, env=environment)
  assert process.returncode == 0, process.stderr
  words = [
    *(sys.executable, '-m', 'nanomoe.main', f'--workdir={workdir}'),
    '--config.num_train_steps=12',
  ]
  process = run(words, env=environment)
  assert process.returncode == 0, process.stderr

  config = json.loads((workdir / 'config.json').read_text())
  assert config['moe']['router']['temperature'] == 2
  assert config['model']['attention']['window'] == 4
  assert config['optimizer']['momentum'] == 0.8
  vocabulary = json.loads((workdir / 'vocabulary.json').read_text())
  words = [token for token in vocabulary['tokens'] if len(token) > 1]
  assert len(words) == 50
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  # Every log is an alarm, and the second process continues the count.
  alarms = [x['gradient_alarms'] for x in logged if 'gradient_alarms' in x]
  assert alarms == [1, 2, 3, 4, 5, 6]
  assert 'gradient norm' in process.stderr
  losses = {x['step']: x['train/loss'] for x in logged if 'train/loss' in x}
  with (workdir / 'log.csv').open(newline='') as file:
    rows = [
      (int(step), float(value))
      for step, key, value in csv.reader(file)
      if key == 'train/loss'
    ]
  assert len(rows) == len(losses)
  assert dict(rows) == pytest.approx(losses)
  process = run(
    [
      *(sys.executable, '-m', 'nanomoe.generate', f'--workdir={workdir}'),
      f'--prompt={words[0]}',
      '--num_tokens=5',
    ],
    env=environment,
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.startswith(words[0])


@pytest.mark.slow
def test_the_router_is_topk_of_softer_logits(importable, tiny):
  """At temperature 1 it is the same function of the same parameters."""

  def loss(changes):
    config = experiment.resolve_auto(tiny({'precision': 'float32', **changes}))
    task = experiment.build_task(config, 20)
    tokens = jnp.arange(17)[None]
    batch = {
      'inputs': tokens[:, :-1],
      'targets': tokens[:, 1:],
      'weights': jnp.ones((1, 16)),
    }

    @QUICKLY
    def total(key):
      params, state = task.init(key, batch)
      return task.loss(params, state, batch, key, train=False)[0].sum

    return float(total(jax.random.key(0)))

  own = {'moe.router.type': 'my_router.Tempered'}
  assert loss(own) == pytest.approx(loss({}), rel=1e-6)
  assert loss({**own, 'moe.router.temperature': 3.0}) != pytest.approx(loss({}))


WINDOW, VOCAB = 3, 11
SLIDING = {
  'model.attention.type': 'my_attention.SlidingWindow',
  'model.attention.window': WINDOW,
  'precision': 'float32',
}


def _task(config):
  """Returns a config's task, and its trained weights, far from linear."""
  config = experiment.resolve_auto(config)
  task = experiment.build_task(config, VOCAB)
  batch = {'inputs': jnp.zeros((1, config.block_size), jnp.int32)}
  params, state = QUICKLY(task.init)(jax.random.key(0), batch)
  return task, (jax.tree.map(lambda x: 3 * x, params), state)


@pytest.mark.slow
@pytest.mark.parametrize(
  'position', ['learned', pytest.param('rope', marks=pytest.mark.slow)]
)
def test_a_wide_window_is_the_attention_of_this_package(
  importable, tiny, rng, position
):
  """A window with room for all tokens makes it the same function."""
  changes = {'precision': 'float32', 'model.position': position}
  task, trained = _task(tiny(changes))
  params = {**trained[0]}
  for block in ('block_0', 'block_1'):
    attention = params[block]['attention']
    names = 'query', 'key', 'value'
    parts = jax.tree.map(
      lambda x: [
        part.reshape(*x.shape[:-1], -1)
        for part in jnp.split(x.reshape(*x.shape[:-1], 2, 3, -1), 3, axis=-2)
      ],
      attention['qkv'],
    )
    params[block] = {
      **params[block],
      'attention': {
        **{
          name: {key: part[i] for key, part in parts.items()}
          for i, name in enumerate(names)
        },
        'out': attention['out'],
      },
    }
  tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 16)), jnp.int32)
  expected, _ = QUICKLY(task.logits)(trained, tokens)
  for window in (16, 99):
    sliding = {**SLIDING, **changes, 'model.attention.window': window}
    other, _ = _task(tiny(sliding))
    logits, _ = QUICKLY(other.logits)((params, trained[1]), tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_token_attends_to_the_last_tokens_alone(importable, tiny, rng):
  task, trained = _task(tiny({**SLIDING, 'model.num_layers': 1}))
  logits = QUICKLY(task.logits)
  tokens = jnp.asarray(rng.integers(0, VOCAB, (1, 16)), jnp.int32)
  before, _ = logits(trained, tokens)
  changed, _ = logits(trained, tokens.at[0, 5].add(1))
  moved = np.abs(changed - before).max(axis=-1)[0] > 1e-3
  assert np.flatnonzero(moved).tolist() == [5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
  'window',
  [WINDOW, 1, 16, 99],
)
def test_its_cache_is_a_ring_buffer_that_changes_no_text(
  importable, tiny, window
):
  """Windows restart several times; prompts have several lengths."""
  changes = {**SLIDING, 'model.attention.window': window}
  task, trained = _task(tiny({**changes, 'model.position': 'rope'}))
  window_tokens = jnp.zeros((2, 16), jnp.int32)
  _, cache = jax.eval_shape(task.logits, trained, window_tokens)
  for array in jax.tree.leaves(cache.blocks):
    assert array.shape == (2, 2, window, 8)
  prompts = [[3], [1, 2, 3, 4, 5], list(range(11)), [7] * 20]
  texts = [
    np.stack(
      list(
        sampling.Generator(task.logits, trained, 16, cached=cached)(
          prompts, 30, sampling.Sampling(0.0), 0
        )
      )
    )
    for cached in (True, False)
  ]
  np.testing.assert_array_equal(*texts)
  assert len(np.unique(texts[0])) > 2


@pytest.mark.slow
def test_a_run_with_an_attention_resumes_bitwise(importable, tiny, tmp_path):
  states = []
  for name, ends in (('whole', [8]), ('parts', [4, 8])):
    for end in ends:
      config = tiny({**SLIDING, 'num_train_steps': end})
      trainer = experiment.build(config, tmp_path / name)
      assert trainer.fit() == 'done'
    states.append(jax.tree.map(np.asarray, trainer.state))
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_dataset_reads_on(importable, tiny):
  config = tiny({'data.dataset.type': 'my_dataset.InOrder'})
  tokens = np.arange(1000, dtype=np.int32)
  dataset = text_lib.build_dataset(config, text_lib.split(tokens))
  rows = slice(0, config.batch_size)
  first, second = (dataset.train_batch(i, rows)['inputs'] for i in (0, 1))
  np.testing.assert_array_equal(second[:, 0], first[:, -1] + 1)


def test_the_tokenizer_is_lossless(importable):
  tokenizer = tokenizers.build({'type': 'my_tokenizer.Words', 'num_words': 2})
  text = 'to be or not to be, that is'
  tokenizer.fit({'train': text, 'val': ''})
  tokens = tokenizer.encode(text)
  assert len(tokens) == len(text) - 4  # 'to' and 'be', twice each.
  assert tokenizer.decode(tokens) == text
  spelled = tokenizer.token_bytes()
  assert b''.join(spelled[t] for t in tokens) == text.encode()


def test_clipping_and_the_schedule_stand_before_the_optimizer(importable, tiny):
  config = tiny(
    {
      'optimizer.type': 'my_optimizer.momentum_sgd',
      'optimizer.momentum': 0.0,
      'optimizer.learning_rate': 0.5,
      'optimizer.clip_norm': 1.0,
    }
  )
  optimizer, _ = optimizers.build(config.optimizer, 10)
  params = jnp.zeros(2)
  updates, _ = optimizer.update(
    jnp.array([3.0, 4.0]), optimizer.init(params), params
  )
  np.testing.assert_allclose(updates, [-0.3, -0.4], rtol=1e-6)


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    (
      {'moe.router.type': 'my_router.Tempered', 'moe.router.temprature': 2},
      [
        'moe.router.temprature: my_router.Tempered(num_experts, top_k, '
        'balance, temperature=1.0) takes no argument',
        "Did you mean 'temperature'?",
      ],
    ),
    (
      {
        'optimizer.type': 'my_optimizer.momentum_sgd',
        'optimizer.momentum': 'x',
      },
      ["optimizer.momentum='x'", 'momentum=0.9', 'float'],
    ),
    (
      {'callbacks.a.type': 'my_callback.GradientAlarm'},
      ['callbacks.a.limit is missing: my_callback.GradientAlarm(limit)'],
    ),
    (
      {'callbacks.a.type': 'my_tokenizer.Words'},
      ['callbacks.a', 'Callback or PeriodicAction'],
    ),
    (
      {'writers.w.type': 'my_callback.GradientAlarm', 'writers.w.limit': 1},
      ['writers.w.type=', 'GradientAlarm', 'MetricWriter'],
    ),
    (
      {'data.dataset.type': 'my_tokenizer.Words'},
      ['data.dataset', 'train_batch'],
    ),
    (
      {'optimizer.type': 'my_callback.GradientAlarm', 'optimizer.limit': 1.0},
      ['optimizer', 'optax.GradientTransformation'],
    ),
    (
      {'data.tokenizer.type': 'my_tokenizer.Wrods'},
      ['data.tokenizer', 'my_tokenizer', "Did you mean 'my_tokenizer.Words'?"],
    ),
    (
      {'model.attention.type': 'my_attention.SlidingWindw'},
      ["Did you mean 'my_attention.SlidingWindow'?"],
    ),
    (
      {**SLIDING, 'model.attention.widow': 3},
      ['model.attention.widow', "Did you mean 'window'?"],
    ),
    (
      {'model.attention.type': 'my_callback.GradientAlarm'}
      | {'model.attention.limit': 1.0},
      ['model.attention.type', 'Linen module'],
    ),
    (
      {'model.attention.type': 'my_old_router.Old'},
      ["model.attention.type='my_old_router.Old'", '(self, x, inputs, *'],
    ),
    (
      {'moe.router.type': 'my_old_router.Old'},
      ["moe.router.type='my_old_router.Old'", '(self, x, inputs, *, train)'],
    ),
    (
      {'moe.router.type': 'flax.linen.Dropout', 'moe.router.rate': 0.5},
      ['inputs'],
    ),
    ({'writers.w.type': 'Excel'}, ['writers.w.type', 'import path']),
  ],
)
def test_mistakes_name_the_plugin_and_its_signature(
  importable, tiny, tmp_path, monkeypatch, overrides, words
):
  monkeypatch.chdir(tmp_path)  # A writer that should not be one opens a file.
  with pytest.raises(UserError) as error:
    experiment.build(tiny(overrides), tmp_path)
  text = '\n'.join(error.value.problems)
  for word in words:
    assert word in text
