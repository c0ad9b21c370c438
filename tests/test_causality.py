"""Attentions, routers and dispatches that see the future, as measured."""

import functools
import itertools
import json
import logging
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe import evaluate, experiment, generate
from nanomoe.model.attention import ATTENTIONS
from nanomoe.model.build import generation_problem
from nanomoe.moe import RouterInputs, causality
from nanomoe.moe.dispatch.registry import DISPATCH
from nanomoe.moe.routers import ROUTERS
from tests.routed import NUM_EXPERTS, QUICKLY, TOP_K, VARIANTS, VOCAB, layer
from tests.shrunk import mostly_slow
from trainers.errors import UserError

BATCH, TIME, CUT = 3, 12, 6
SMALL = {
  'block_size': TIME,
  'model.num_layers': 1,
  'moe.num_experts': NUM_EXPERTS,
  'moe.capacity_factor': 0.6,  # Some are dropped.
  'moe.top_k': TOP_K,
  'precision': 'float32',
}


def _changes(variant, name):
  kind, arguments = VARIANTS[variant]
  arguments = {k: v for k, v in arguments.items() if k != 'vocab_size'}
  return {
    **SMALL,
    'moe.dispatch': name,
    'moe.router.type': kind,
    **{f'moe.router.{k}': v for k, v in arguments.items()},
  }


def _model(variant, name, tiny, rng):
  """Returns `(tokens, train) -> logits` of a whole model."""
  return _model_of(tiny(_changes(variant, name)), rng)


def _model_of(config, rng):
  """Returns the same for the model of a config."""
  task = experiment.build_task(experiment.resolve_auto(config), VOCAB)
  batch = {'inputs': jnp.zeros((BATCH, TIME), jnp.int32)}
  params, state = _random(task.init, rng, jax.random.key(0), batch)

  def logits(tokens, train):
    mask, key = jnp.ones(tokens.shape, bool), jax.random.key(0)
    return task.model.apply(
      {'params': params},
      tokens,
      mask,
      bias=state.get('bias'),
      train=train,
      rngs={'dropout': key, 'routing': key},
    )[0]

  return logits


def _layer(variant, name, tiny, rng, eval_dispatch=''):
  """Returns the same for embeddings, one layer of experts and a head: quick."""
  del tiny
  moe = layer(
    variant,
    name,
    capacity_factor=SMALL['moe.capacity_factor'],
    eval_dispatch=eval_dispatch,
  )

  def inputs(tokens):
    return RouterInputs(tokens, jnp.ones(tokens.shape, bool), bias)

  bias = jnp.asarray(rng.normal(size=NUM_EXPERTS), jnp.float32)
  embedding = jnp.asarray(rng.normal(size=(VOCAB, 5)), jnp.float32)
  tokens = jnp.zeros((BATCH, TIME), jnp.int32)
  init = functools.partial(moe.init, train=False)
  params = _random(
    init, rng, jax.random.key(0), embedding[tokens], inputs(tokens)
  )

  def logits(tokens, train):
    rngs = {'routing': jax.random.key(0)}
    x, _ = moe.apply(
      params, embedding[tokens], inputs(tokens), train=train, rngs=rngs
    )
    return x @ embedding.T

  return logits


def _random(init, rng, *args):
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    jax.eval_shape(init, *args),
  )


def find(logits, rng, modes=(False, True)) -> set[str]:
  """Returns what moves a logit of the first sequence, before CUT.

  'future' stands for its own later tokens, 'others' for other sequences.

  Args:
    logits: Function `(tokens, train) -> logits`.
    rng: Source of the tokens.
    modes: Values of `train` to try; training has one key for all tokens.
  """
  tokens = rng.integers(0, VOCAB, (BATCH, TIME)).astype(np.int32)

  @QUICKLY
  def earlier(tokens):
    each = [logits(tokens, train)[0, :CUT] for train in modes]
    return jnp.stack(each)

  before, found = earlier(tokens), set()
  places = {'future': (0, slice(CUT, None)), 'others': slice(1, None)}
  for shift, (what, place) in itertools.product(range(1, 5), places.items()):
    changed = tokens.copy()
    changed[place] = (changed[place] + shift) % VOCAB
    moved = np.abs(earlier(changed) - before).max()
    assert moved < 1e-3 or moved > 1e-2  # Rounding, or not.
    found |= {what} if moved > 1e-2 else set()
  return found


@pytest.mark.parametrize(
  'of', [_layer, pytest.param(_model, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('name', mostly_slow(DISPATCH, 'dropless'))
@pytest.mark.parametrize('variant', VARIANTS)
def test_each_label_is_what_is_found(variant, name, of, tiny, rng):
  found = find(of(variant, name, tiny, rng), rng)
  objection = causality.objection(tiny(_changes(variant, name)))
  assert bool(found) == bool(objection)


class Bidirectional(nn.Module):
  """Mean over all tokens of a sequence, later ones too."""

  causal = False

  @nn.compact
  def __call__(self, x, inputs, *, train):
    y = nn.Dense(x.shape[-1])(x).mean(axis=1, keepdims=True)
    return jnp.broadcast_to(y, x.shape), ()


@pytest.mark.parametrize(
  'attention', [*ATTENTIONS, f'{__name__}.{Bidirectional.__name__}']
)
def test_the_label_of_each_attention_is_what_is_found(attention, tiny, rng):
  changes = _changes('TopK', 'dense') | {'model.attention.type': attention}
  config = tiny(changes)
  problem = generation_problem(config)
  assert bool(find(_model_of(config, rng), rng)) == bool(problem)
  assert (f'model.attention.type={attention}' in problem) == bool(problem)


def test_all_parts_that_are_not_causal_are_named(tiny):
  attention = f'{__name__}.{Bidirectional.__name__}'
  changes = {'model.attention.type': attention}
  problem = generation_problem(
    tiny(_changes('ExpertChoice', 'dense') | changes)
  )
  for part in ('moe.router.type=ExpertChoice', f'type={attention}'):
    assert part in problem


@pytest.mark.parametrize('router', ROUTERS.values())
def test_each_label_is_in_the_docstring(router):
  [negation] = re.findall(r'is\s+(not\s+)?causal', router.__doc__)
  assert bool(negation) != router.causal


def test_the_objection_names_who_is_to_blame(tiny):
  causal = tiny(_changes('TopK', 'dropless'))
  assert causality.objection(causal) == ''
  # Without a label.
  causal.moe.router.type = 'flax.linen.Dense'
  assert causality.objection(causal) == ''
  other = tiny(_changes('ExpertChoice', 'dense'))
  assert causality.objection(other).startswith('moe.router.type=ExpertChoice: ')


def test_the_dispatch_of_evaluation_decides_on_generation(tiny, rng):
  """A model trained with capacity is causal in evaluation alone."""
  own = {'moe.eval_dispatch': 'dropless'}
  config = experiment.resolve_auto(tiny(_changes('TopK', 'capacity') | own))
  assert causality.objection(config) == ''
  layer = experiment.build_task(config, VOCAB).model.blocks[0].keywords
  moe = layer['feed_forward']()
  assert moe.dispatch is not moe.eval_dispatch
  logits = _layer('TopK', 'capacity', tiny, rng, eval_dispatch='dropless')
  assert find(logits, rng, modes=[False]) == set()
  assert find(logits, rng, modes=[True])
  # The other way round, the key of evaluation is to blame.
  config.moe.update({'dispatch': 'dropless', 'eval_dispatch': 'capacity'})
  assert causality.objection(config).startswith('moe.eval_dispatch=capacity: ')


def test_the_dispatch_of_training_is_that_of_evaluation_by_default(tiny):
  config = experiment.resolve_auto(tiny(_changes('TopK', 'capacity')))
  moe = (
    experiment.build_task(config, VOCAB)
    .model.blocks[0]
    .keywords['feed_forward']()
  )
  assert moe.dispatch is moe.eval_dispatch
  assert causality.objection(config).startswith('moe.dispatch=capacity: ')


@pytest.mark.slow
def test_a_model_trained_with_capacity_generates_text(tiny, tmp_path):
  """Results say which dispatch a loss is with; a resume may choose another."""
  changes = {
    'num_train_steps': 4,
    'moe.dispatch': 'capacity',
    'moe.capacity_factor': 0.6,
    'moe.eval_dispatch': 'dropless',
  }
  trainer = experiment.build(tiny(changes), tmp_path)
  assert trainer.fit() == 'done'
  assert (tmp_path / 'sample.txt').read_text()
  result = json.loads((tmp_path / 'result.json').read_text())
  assert result['dispatch'] == 'capacity'
  assert result['eval_dispatch'] == 'dropless'
  logged = [
    json.loads(line)
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()
  ]
  dropped = {
    split: [np.mean(x[key]) for x in logged if key in x]
    for split in ('train', 'val')
    if (key := f'{split}/dropped_fraction')
  }
  assert min(dropped['train']) > 0
  assert max(dropped['val']) == 0
  [text] = zip(*generate.generate(tmp_path, ['a'], num_tokens=5), strict=True)
  assert len(''.join(text)) == 5
  found = evaluate.evaluate(tmp_path, 'val', 'latest')
  assert found['dispatch'] == 'dropless'
  assert found['dropped_fraction'] == [0, 0]

  experiment.build(tiny(changes | {'moe.eval_dispatch': ''}), tmp_path).fit()
  with pytest.raises(UserError, match=r'moe\.dispatch=capacity'):
    generate.generate(tmp_path, ['a'])
  found = evaluate.evaluate(tmp_path, 'val', 'latest')
  assert found['dispatch'] == 'capacity'
  assert min(found['dropped_fraction']) > 0


def test_no_text_is_generated(tiny, tmp_path, caplog):
  """A run warns when it starts; the command fails with the same reason."""
  with caplog.at_level(logging.WARNING):
    trainer = experiment.build(tiny(_changes('ExpertChoice', 'auto')), tmp_path)
  [line] = [r.getMessage() for r in caplog.records if 'causal' in r.message]
  assert line.endswith('; no text is sampled')
  assert 'TextSample' not in trainer.callbacks.names
  with pytest.raises(UserError) as error:
    generate.generate(tmp_path, ['a'])
  reason = line.removesuffix('; no text is sampled')
  assert error.value.problems == [f'no text can be generated: {reason}']
