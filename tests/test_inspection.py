"""Statistics of routing against loops over tokens, nulls and intervals."""

import itertools
import json
import math

import numpy as np
import pytest

from nanomoe.inspection import (
  coactivation,
  contexts,
  figures,
  labels,
  page,
  predictability,
  saturation,
  specialization,
)
from nanomoe.inspection.labels import Labels
from nanomoe.inspection.trace import Trace, join
from nanomoe.run.history import Series

E, K, LAYERS, TOKENS, BLOCK, VOCAB = 5, 2, 3, 240, 8, 6


def make_trace(rng, num_experts=E, layers=LAYERS, tokens=TOKENS, k=K):
  """Returns random routing, with empty second choices and empty tokens."""
  scores = rng.random((layers, tokens, num_experts))
  experts = np.argsort(-scores, axis=2)[..., :k].astype(np.int32)
  number = rng.integers(0, k + 1, (layers, tokens, 1))
  is_used = np.arange(k) < np.where(rng.random(number.shape) < 0.8, k, number)
  weights = np.where(is_used, -np.sort(-rng.random(experts.shape)), 0)
  return Trace(
    rng.integers(0, VOCAB, tokens).astype(np.int32),
    (np.arange(tokens) % BLOCK).astype(np.int32),
    tuple(range(layers)),
    num_experts,
    np.where(is_used, experts, num_experts).astype(np.int32),
    weights.astype(np.float32),
    is_used,
  )


@pytest.fixture
def trace(rng):
  return make_trace(rng)


def choices(trace, layer, token):
  """Returns the experts of a token, as a list of integers."""
  found = trace.experts[layer, token].tolist()
  return [e for e in found if e < trace.num_experts]


def random_labels(rng, trace, num_labels=3):
  ids = rng.integers(-1, num_labels, len(trace.tokens))
  return Labels(list('abc'), ids, np.arange(len(ids)))


# Specialization.


def test_lift_and_information_are_those_of_a_loop(rng, trace):
  found = random_labels(rng, trace)
  result = specialization.specialization(trace, found)
  for layer in range(LAYERS):
    pairs = [
      (e, int(found.ids[t]))
      for t in range(TOKENS)
      for e in choices(trace, layer, t)
      if found.ids[t] >= 0
    ]
    n, information = len(pairs), 0.0
    for e, v in itertools.product(range(E), range(3)):
      both = pairs.count((e, v))
      of_e = sum(pair[0] == e for pair in pairs)
      of_v = sum(pair[1] == v for pair in pairs)
      lift = (both / of_v) / (of_e / n)
      assert result.counts[layer, e, v] == both
      assert result.lift[layer, e, v] == pytest.approx(lift)
      information += both / n * math.log2(lift)
    assert result.information[layer] == pytest.approx(information)


def test_the_null_is_a_loop_over_permutations_of_units(rng, trace):
  """Units are windows here: a permutation exchanges whole windows."""
  ids = rng.integers(0, 3, TOKENS // BLOCK)[trace.windows]
  found = Labels(list('abc'), ids, trace.windows)
  result = specialization.specialization(trace, found, seed=7)
  generator = np.random.default_rng(7)
  samples = []
  for _ in range(specialization.NUM_PERMUTATIONS):
    order = generator.permutation(ids[::BLOCK])
    counts = np.zeros((E, 3))
    for t in range(TOKENS):
      for e in choices(trace, 1, t):
        counts[e, order[t // BLOCK]] += 1
    samples.append(specialization.lift_of(counts))
  ordered = np.sort(samples, axis=0)
  np.testing.assert_allclose(result.null_low[1], ordered[4])
  np.testing.assert_allclose(result.null_high[1], ordered[195])


def test_a_dependence_is_found_and_independence_is_not(rng):
  """Label and expert are equal, or independent; the lift of equal ones is E."""
  trace = make_trace(rng, k=1, layers=1, tokens=4000)
  first = trace.experts[0, :, 0]
  ids = np.where(first < E, first, -1)
  names = [str(e) for e in range(E)]
  units = np.arange(4000)
  equal = specialization.specialization(trace, Labels(names, ids, units))
  assert equal.p_value[0] == pytest.approx(1 / 201)
  diagonal = np.diagonal(equal.lift[0])
  assert (diagonal > np.diagonal(equal.null_high[0])).all()
  np.testing.assert_allclose(diagonal, E, rtol=0.2)
  other = Labels(names, rng.integers(0, E, 4000), units)
  chance = specialization.specialization(trace, other)
  assert chance.p_value[0] > 0.02
  inside = (chance.lift >= chance.null_low) & (chance.lift <= chance.null_high)
  assert inside.mean() > 0.8
  # The intervals of independent labels contain 1.
  assert ((chance.low < 1) & (chance.high > 1)).mean() > 0.8


def test_the_bootstrap_covers_the_true_lift(rng):
  """Of 40 samples of independent windows, most intervals contain lift 1."""
  covered = []
  for _ in range(40):
    trace = make_trace(rng, layers=1, tokens=30 * BLOCK, k=1)
    # Tokens of a window share their expert: they are not independent.
    experts = trace.experts[0, ::BLOCK][trace.windows]
    trace = trace._replace(experts=experts[None])
    ids = rng.integers(0, 2, 30)[trace.windows]
    found = Labels(['a', 'b'], ids, trace.windows)
    result = specialization.specialization(trace, found)
    covered.append((result.low < 1) & (result.high > 1))
  assert np.mean(covered) > 0.85


@pytest.mark.parametrize('windows', [1, specialization.MIN_GROUPS - 1])
def test_few_windows_have_no_interval(rng, windows):
  trace = make_trace(rng, tokens=windows * BLOCK)
  result = specialization.specialization(trace, random_labels(rng, trace))
  assert np.isnan(result.low).all() and np.isnan(result.high).all()


def test_ranges_of_positions_are_no_independent_labels(rng):
  """Experts that last for half a window, at random, have no specialization."""
  p_values = []
  for _ in range(20):
    trace = make_trace(rng, layers=1, tokens=20 * 64, k=1)
    positions = (np.arange(20 * 64) % 64).astype(np.int32)
    starts = rng.integers(0, 64, 20 * 64)
    experts = np.empty(20 * 64, np.int32)
    for t in range(20 * 64):
      is_new = not t or starts[t] < 2
      experts[t] = rng.integers(E) if is_new else experts[t - 1]
    trace = trace._replace(positions=positions, experts=experts[None, :, None])
    found = labels.of_positions(trace.positions, trace.windows)
    result = specialization.specialization(trace, found)
    p_values.append(float(result.p_value[0]))
  assert np.median(p_values) > 0.1


# Labels.


def test_speakers_have_the_text_of_their_lines():
  text = 'Lost.\n\nROMEO:\nAh!\nso: No\n\nNURSE:\nO, sir.\n\nROMEO:\nHm'
  found = labels.of_speakers(list(text), np.zeros(len(text), int))
  said = {
    name: ''.join(c for c, i in zip(text, found.ids, strict=True) if i == n)
    for n, name in enumerate(found.names)
  }
  assert said['NURSE'] == 'O, sir.\n\n'
  assert said['ROMEO'] == 'Ah!\nso: No\n\nHm'
  # The last speaker of a text does not speak in the next one.
  second = labels.of_speakers(
    list(text + 'new'), np.repeat([0, 1], [len(text), 3])
  )
  assert (second.ids[-3:] == -1).all()
  # The first line of each text can be that of a speaker.
  both = 'ROMEO:\nAh!\n', 'ГАМЛЕТ:\r\nБыть\r\n\r\nOPHELIA:\r\nHm'
  third = labels.of_speakers(
    list(''.join(both)), np.repeat([0, 1], list(map(len, both)))
  )
  assert sorted(third.names) == ['OPHELIA', 'ROMEO', 'ГАМЛЕТ']


@pytest.mark.parametrize(
  ('token', 'expected'),
  [
    ('a', 'lower case'),
    (' the', 'lower case'),
    ('The', 'upper case'),
    ('漢字', 'other letters'),
    ('12', 'digits'),
    (' \n', 'whitespace'),
    ('', 'whitespace'),
    ("--'", 'punctuation'),
    ('a1', 'mixed'),
  ],
)
def test_classes_of_tokens(token, expected):
  assert labels.token_class(token.encode()) == expected
  assert labels.token_class('漢'.encode()[:1]) == 'part of a character'


def test_positions_are_ranges_of_powers_of_two():
  found = labels.of_positions(np.arange(9), np.zeros(9, int))
  names = [found.names[i] for i in found.ids]
  assert names == ['0', '1', *['2-3'] * 2, *['4-7'] * 4, '8-15']


def test_frequent_tokens_are_labels_and_the_rest_is_one():
  tokens = np.repeat(np.arange(60), np.arange(1, 61))
  utf8 = [chr(0x4E00 + i).encode() for i in range(60)]
  found = labels.of_tokens(tokens, utf8)
  assert found.names[0] == utf8[59].decode()
  assert found.names[-1] == labels.OTHER
  assert len(found.names) == labels.MAX_TOKENS + 1
  counts = np.bincount(found.ids)
  assert counts[0] == 60 and counts[-1] == 20 * 21 // 2


def test_a_character_belongs_to_the_token_that_completes_it():
  utf8 = [bytes([b]) for b in 'aé漢'.encode()]
  assert labels.pieces(utf8) == ['a', '', 'é', '', '', '漢']


# Pairs, saturation, predictability and contexts.


def test_pairs_are_those_of_loops(trace):
  of_token = coactivation.of_tokens(trace)
  across = coactivation.across_layers(trace)
  for layer, (a, b) in itertools.product(range(LAYERS), np.ndindex(E, E)):
    sets = [set(choices(trace, layer, t)) for t in range(TOKENS)]
    both = sum(a in s and b in s for s in sets)
    if a != b:
      loads = [sum(e in s for s in sets) for e in range(E)]
      pairs = sum(len(s) * (len(s) - 1) for s in sets)
      products = sum(x * y for x, y in itertools.permutations(loads, 2))
      chance = loads[a] * loads[b] * pairs / products
      assert of_token.counts[layer, a, b] == both
      assert of_token.lift[layer, a, b] == pytest.approx(both / chance)
    if layer:
      first = trace.experts[layer - 1 : layer + 1, :, 0]
      pairs = [tuple(p) for p in first.T.tolist() if max(p) < E]
      n = pairs.count((a, b))
      rows = sum(p[0] == a for p in pairs)
      columns = sum(p[1] == b for p in pairs)
      assert across.counts[layer - 1, a, b] == n
      assert across.lift[layer - 1, a, b] == pytest.approx(
        n * len(pairs) / (rows * columns)
      )


def test_pairs_of_random_experts_have_a_lift_of_1(rng):
  found = coactivation.of_tokens(make_trace(rng, tokens=20_000, layers=1))
  lift = found.lift[0][~np.eye(E, dtype=bool)]
  np.testing.assert_allclose(lift, 1, atol=0.1)


def test_saturation_is_a_loop_and_1_for_equal_choices(rng, trace):
  other = make_trace(rng)
  found = saturation.saturation(other, trace)
  for layer in range(LAYERS):
    sets = [
      (set(choices(other, layer, t)), set(choices(trace, layer, t)))
      for t in range(TOKENS)
    ]
    total = sum(len(b) for _, b in sets)
    assert found.overlap[layer] == pytest.approx(
      sum(len(a & b) for a, b in sets) / total
    )
    # The mean over all pairs of tokens.
    pairs = sum(len(a & b) for a, _ in sets for _, b in sets)
    assert found.chance[layer] == pytest.approx(pairs / TOKENS / total)
  np.testing.assert_allclose(saturation.saturation(trace, trace).overlap, 1)


def test_predictability_is_the_accuracy_of_a_table(rng, trace):
  # The second layer follows from the token, the third from the second.
  experts = trace.experts.copy()
  experts[1, :, 0] = trace.tokens % E
  experts[2, :, 0] = (experts[1, :, 0] + 1) % E
  one = np.zeros(TOKENS, int)
  found = predictability.predictability(trace._replace(experts=experts), one)
  assert found.token[1] == found.token[2] == found.previous[2] == 1
  assert np.isnan(found.previous[0])
  held_out = experts[:, trace.windows % 2 == 1, 0] < E
  np.testing.assert_array_equal(found.num_held_out, held_out.sum(axis=1))
  for i, feature in enumerate([trace.tokens, trace.positions]):
    table, base = {}, []
    for t in range(TOKENS):
      if t // BLOCK % 2 == 0 and experts[0, t, 0] < E:
        table.setdefault(feature[t], []).append(experts[0, t, 0])
        base.append(experts[0, t, 0])
    right = [
      experts[0, t, 0] == _mode(table.get(feature[t], base))
      for t in range(TOKENS)
      if t // BLOCK % 2 and experts[0, t, 0] < E
    ]
    assert found[1 + i][0] == pytest.approx(np.mean(right))


def test_each_text_is_counted_and_predicted(rng):
  """Two texts of one window each: their tokens choose different experts."""
  trace = make_trace(rng, layers=1, tokens=2 * BLOCK)
  text = trace.windows
  experts = np.repeat(text, K).reshape(1, -1, K).astype(np.int32)
  trace = trace._replace(experts=experts, tokens=text.astype(np.int32))
  found = predictability.predictability(trace, text)
  assert found.token[0] == 1
  assert found.num_held_out[0] == BLOCK


def _mode(values):
  return np.bincount(values).argmax()


def test_contexts_have_the_highest_weights_once(trace):
  pieces = [chr(97 + t) for t in trace.tokens]
  text = np.arange(TOKENS) >= TOKENS // 2
  found = contexts.contexts(trace, 0, 2, pieces, text)
  weights = sorted(
    (
      float(w)
      for t in range(TOKENS)
      for e, w in zip(trace.experts[0, t], trace.weights[0, t], strict=True)
      if e == 2
    ),
    reverse=True,
  )
  assert found[0].weight == pytest.approx(weights[0])
  assert len(found) == contexts.NUM_CONTEXTS
  keys = {(c.before[-2:], c.token) for c in found}
  assert len(keys) == len(found)
  halves = [''.join(pieces[: TOKENS // 2]), ''.join(pieces[TOKENS // 2 :])]
  assert all(
    any(c.before + c.token + c.after in half for half in halves) for c in found
  )


# The page.


TOKENS_PER_STEP = 7


def _figures(rng, trace, names=('val',), utf8=None, loads=None, earlier=None):
  text = np.arange(len(trace.tokens)) * len(names) // len(trace.tokens)
  utf8 = utf8 or [chr(97 + i).encode() for i in range(VOCAB)]
  sample = figures.Sample(list(names), text, utf8)
  return figures.make(sample, trace, earlier or {}, 10, loads, TOKENS_PER_STEP)


def test_every_figure_states_layers_split_and_tokens(rng, trace):
  loads = Series(np.array([1, 2]), rng.random((2, LAYERS, E)))
  made = _figures(rng, trace, ('a', 'b'), None, loads, {5: make_trace(rng)})
  assert set(made) >= {'text', 'saturation', 'load_history', 'contexts'}
  for name, figure in made.items():
    assert figure['layers'] == [0, 1, 2]
    assert figure['split'] == ('train' if name == 'load_history' else 'a, b')
    is_of_training = name == 'load_history'
    expected = 2 * TOKENS_PER_STEP if is_of_training else TOKENS
    if not name.startswith('specialization'):  # Some tokens have no label.
      assert figure['num_tokens'] == expected
  assert made['specialization_text']['labels'] == ['a', 'b']
  assert made['loads']['without_expert'] == [
    round(sum(not choices(trace, i, t) for t in range(TOKENS)) / TOKENS, 4)
    for i in range(LAYERS)
  ]


def test_the_page_escapes_every_text(rng, trace):
  attack = '</script><script>alert(1)</script><!--'
  utf8 = [attack.encode()] * VOCAB
  values = {
    'about': {'workdir': attack},
    'figures': _figures(rng, trace, (attack,), utf8),
  }
  html = page.html(values)
  assert attack not in html and 'alert(1)</script>' not in html
  assert html.count('<script') == html.count('</script>') == 2
  literal = html.partition('id="data">')[2].partition('</script>')[0]
  assert json.loads(literal)['about']['workdir'] == attack
  assert 'src=' not in html and '//cdn' not in html
  assert 'innerHTML' not in html


def test_the_text_tells_which_choices_were_dropped_or_left_out(rng):
  trace = make_trace(rng, num_experts=9, k=6)
  trace = trace._replace(
    computed=(trace.experts < 9) & (rng.random(trace.experts.shape) < 0.7)
  )
  text = _figures(rng, trace)['text']
  for layer in range(LAYERS):
    bits = dict(map(tuple, text['dropped'][layer]))
    for t in range(TOKENS):
      own = trace.experts[layer, t] < 9
      dropped = own & ~trace.computed[layer, t]
      assert [bits.get(t, 0) >> c & 1 for c in range(4)] == [*dropped[:4]]
      assert text['num_choices'][layer][t] == own.sum()
      assert len(text['choices'][layer][t]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
  ('num_experts', 'k', 'computed'), [(128, 8, 1.0), (42, 4, 0.2)]
)
def test_the_page_of_a_large_model_is_below_5_mb(rng, num_experts, k, computed):
  trace = make_trace(rng, num_experts=num_experts, layers=24, tokens=8192, k=k)
  trace = trace._replace(
    tokens=rng.integers(0, 400, 8192).astype(np.int32),
    computed=rng.random(trace.experts.shape) < computed,
  )
  utf8 = [chr(0x1F300 + i).encode() * 3 for i in range(400)]
  loads = Series(np.arange(500), rng.random((500, 24, num_experts)))
  earlier = dict.fromkeys(range(30), trace)
  names = [f'text {i}' for i in range(20)]
  made = _figures(rng, trace, names, utf8, loads, earlier)
  assert len(page.html({'about': {}, 'figures': made}).encode()) < 5_000_000


def test_texts_are_joined(rng):
  """Traces of different width are joined; empty choices fill the narrow one."""
  wide, narrow = make_trace(rng), make_trace(rng, k=1)
  joined = join([wide, narrow])
  assert joined.experts.shape == (LAYERS, 2 * TOKENS, K)
  np.testing.assert_array_equal(joined.experts[:, TOKENS:, :1], narrow.experts)
  assert (joined.experts[:, TOKENS:, 1] == E).all()
  assert joined.windows[-1] == 2 * wide.windows[-1] + 1
