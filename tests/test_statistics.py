"""Compares metrics of routing with loops over tokens in NumPy."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanomoe.model.transformer import _stack
from nanomoe.moe import RouterInputs, make_routing, statistics
from nanomoe.moe.layer import MoEAux
from nanomoe.task import LanguageModel
from tests.routed import NUM_EXPERTS, QUICKLY, TOP_K, VARIANTS, layer, make
from tests.shrunk import mostly_slow
from trainers import metrics as metrics_lib

VOCAB, LAYERS, E = 9, 3, 5
WATCHED = [7, 0, 3]
# What the router thinks of each token.
PROBS = np.random.default_rng(1).dirichlet(np.ones(E), VOCAB).astype(np.float32)


class Routed(nn.Module):
  """Model whose tokens get experts and weights from a table."""

  expert: Any
  weight: Any

  def apply(self, variables, inputs, mask, *, bias, train, rngs):
    del variables, bias, train, rngs
    tokens = inputs.reshape(-1)
    probs = jnp.asarray(PROBS)[tokens]
    reports = []
    for expert, weight in zip(self.expert, self.weight, strict=True):
      routing = make_routing(
        jnp.asarray(expert)[tokens], jnp.asarray(weight)[tokens], probs, mask,
        'all_choices',
      )  # fmt: skip
      reports.append(
        MoEAux(
          routing.load, routing.losses, routing.metrics, routing.expert, None
        )
      )
    return jnp.zeros((*inputs.shape, VOCAB)), _stack(reports), None


def draw_model(rng, num_layers=LAYERS):
  """Returns a model whose last expert is dead."""
  expert = [
    [rng.permutation(E - 1)[:2] for _ in range(VOCAB)]
    for _ in range(num_layers)
  ]
  weight = rng.random((num_layers, VOCAB, 2)).astype(np.float32)
  return Routed(np.array(expert, np.int32), weight)


def draw_batch(rng, rows):
  weights = (rng.random((rows, 8)) < 0.8).astype(np.float32)
  return {
    'inputs': rng.integers(0, VOCAB, (rows, 8)).astype(np.int32),
    'targets': np.zeros((rows, 8), np.int32),
    'weights': weights,
  }


def measured(model, *batches, train=False):
  """Returns the merged metrics of all batches."""
  task = LanguageModel(model, 0.25, 'all_choices', watched=WATCHED)

  @QUICKLY
  def metrics(batch):
    state = {'aux_weight': jnp.float32(0.25)}
    key = jax.random.key(0)
    return task.loss({}, state, batch, key, train=train)[1].metrics

  merged = metrics(batches[0])
  for batch in batches[1:]:
    merged = metrics_lib.merge(merged, metrics(batch))
  return metrics_lib.compute(merged)


def entropy(counts):
  p = np.array([c for c in np.ravel(counts) if c]) / np.sum(counts)
  return -np.sum(p * np.log(p))


def expected(model, *batches):
  """Returns all metrics by counting tokens one after the other."""
  num_layers = len(model.expert)
  load = np.zeros((num_layers, E))
  pairs = np.zeros((num_layers, E, E))
  words = np.zeros((num_layers, E, len(WATCHED)))
  gates = np.zeros(num_layers)
  num_tokens, vios, aux = 0, [], []
  for batch in batches:
    earlier = load.copy()
    for word, weight in zip(
      batch['inputs'].ravel(), batch['weights'].ravel(), strict=True
    ):
      if not weight:
        continue
      num_tokens += 1
      for i in range(num_layers):
        for e in model.expert[i, word]:
          load[i, e] += 1
          if word in WATCHED:
            words[i, e, WATCHED.index(word)] += 1
        gates[i] += model.weight[i, word, 0]
        before = model.expert[i - 1, word, 0] if i else 0
        pairs[i, before, model.expert[i, word, 0]] += 1
    own = load - earlier
    vios.append((own.max(axis=1) - own.mean(axis=1)) / own.mean(axis=1))
    share = own / own.sum(axis=1, keepdims=True)
    seen = PROBS[batch['inputs'][batch['weights'] > 0]]
    aux.append(np.mean(E * share @ seen.mean(axis=0)))
  told = [
    (entropy(p.sum(1)) + entropy(p.sum(0)) - entropy(p)) / entropy(p.sum(0))
    for p in pairs
  ]
  sizes = [batch['weights'].sum() for batch in batches]
  return {
    'expert_load': load / load.sum(axis=1, keepdims=True),
    'load_entropy': [entropy(row) for row in load],
    'max_over_mean_load': load.max(axis=1) / load.mean(axis=1),
    'max_vio': np.average(vios, axis=0, weights=sizes),
    'aux_loss': np.average(aux, weights=sizes),
    'dead_experts': np.mean(load == 0, axis=1),
    'first_gate': gates / num_tokens,
    'co_activation': told,
    'first_choices': pairs,
    'token_experts': words,
  }


@pytest.mark.parametrize('num_layers', [1, LAYERS])
def test_metrics_are_what_loops_count(rng, num_layers):
  """One batch, and two of different sizes; a fifth of the tokens is padding."""
  model = draw_model(rng, num_layers)
  batches = [draw_batch(rng, rows) for rows in (2, 5)]
  for some in (batches[:1], batches):
    found, wanted = measured(model, *some), expected(model, *some)
    for name, value in wanted.items():
      np.testing.assert_allclose(found[name], value, 1e-5, 1e-6, err_msg=name)
    assert min(found['dead_experts']) >= 1 / E
  # Nothing is before the first.
  assert found['co_activation'][0] == pytest.approx(0, abs=1e-9)


def test_parts_merged_are_one_batch(rng):
  """The balance loss and MaxVio are means over batches and differ.

  MaxVio of parts is no less than MaxVio of the whole.
  """
  model, whole = draw_model(rng), draw_batch(rng, 6)
  parts = [{k: x[i : i + 2] for k, x in whole.items()} for i in (0, 2, 4)]
  merged, at_once = measured(model, *parts), measured(model, whole)
  vio = np.array(merged.pop('max_vio'))
  of_all = np.array(at_once.pop('max_vio'))
  assert merged.pop('aux_loss') != at_once.pop('aux_loss')
  for name, value in at_once.items():
    np.testing.assert_allclose(merged[name], value, 1e-5, err_msg=name)
  np.testing.assert_allclose(
    of_all, np.array(at_once['max_over_mean_load']) - 1, 1e-5
  )
  assert (vio > of_all - 1e-6).all() and (vio > of_all + 1e-3).any()


def test_a_dead_expert_is_dead_in_all_of_the_window(rng):
  """Word 1 has experts 0 and 1, word 2 has 2 and 3; the last is dead."""
  model = draw_model(rng, 1)
  model.expert[0, 1], model.expert[0, 2] = [0, 1], [2, 3]
  one, two = draw_batch(rng, 2), draw_batch(rng, 2)
  one['inputs'][:], two['inputs'][:] = 1, 2
  assert measured(model, one)['dead_experts'] == pytest.approx([0.6])
  assert measured(model, one, two)['dead_experts'] == pytest.approx([0.2])


def test_training_counts_no_pictures_and_tells_the_weight(rng):
  names = set(measured(draw_model(rng), draw_batch(rng, 2), train=True))
  assert not names & {'first_choices', 'token_experts'}
  assert names >= {'co_activation', 'aux_weight', 'first_gate', 'max_vio'}


def test_nothing_is_said_of_padding_alone(rng):
  batch = draw_batch(rng, 2)
  batch['weights'][:] = 0
  found = measured(draw_model(rng), batch)
  for name in ('load_entropy', 'dead_experts', 'max_vio', 'first_gate'):
    assert np.isnan(found[name]).all(), name


@pytest.mark.parametrize(
  'variant', mostly_slow(VARIANTS, 'TopK', 'ExpertChoice')
)
def test_every_router_reports(variant, rng):
  """The first gate and the counts agree with loops over rows."""
  tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 6)), jnp.int32)
  mask = jnp.asarray(rng.random((2, 6)) < 0.7)
  x = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
  router = make(variant)

  @QUICKLY
  def run():
    rngs = {'params': jax.random.key(1), 'routing': jax.random.key(2)}
    inputs = RouterInputs(tokens, mask)
    return router.init_with_output(rngs, x, inputs, train=True)[0]

  routing = run()
  one = jax.tree.map(lambda a: a[None], (routing.expert, routing.token))
  counts = statistics.token_expert_counts(
    *one, tokens, jnp.arange(VOCAB), NUM_EXPERTS
  )[0]
  wanted, gates = np.zeros((NUM_EXPERTS, VOCAB)), []
  rows = range(len(routing.expert))
  for row, token in zip(
    rows, rows if routing.token is None else routing.token, strict=True
  ):
    assert mask.ravel()[token] or (routing.expert[row] == NUM_EXPERTS).all()
    gates += [routing.weight[row, 0]] if mask.ravel()[token] else []
    for e in routing.expert[row]:
      if e < NUM_EXPERTS:
        wanted[e, tokens.ravel()[token]] += 1
  np.testing.assert_array_equal(counts, wanted)
  np.testing.assert_array_equal(counts.sum(axis=1), routing.load)
  if routing.token is not None:
    is_used = np.asarray(routing.expert[:, 0]) < NUM_EXPERTS
    gates = np.asarray(routing.weight)[is_used, 0]
  assert routing.metrics['first_gate'].compute() == pytest.approx(
    np.mean(gates), rel=1e-5
  )


@pytest.mark.parametrize('variant', ['TopK', 'ExpertChoice'])
def test_a_layer_hands_on_what_was_chosen(variant, rng):
  moe = layer(variant, 'dense')
  x = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
  given = RouterInputs(jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 6), bool))

  def run(key):
    return moe.init_with_output(key, x, given, train=False)[0][1]

  aux = jax.eval_shape(run, jax.random.key(0))
  if variant == 'TopK':
    assert aux.expert.shape == (12, TOP_K) and aux.token is None
  else:  # 12 tokens, two experts each in the mean: 4 for each of 6 experts.
    assert aux.expert.shape == (24, 1) and aux.token.shape == (24,)
