"""Pictures of routing: their cells, their growth and their size."""

import json
import types

import numpy as np
import pytest

from nanomoe.callbacks import (
  CoActivation,
  LoadHistory,
  Specialization,
  axes,
  specialization,
)
from nanomoe.callbacks.heatmap import colored
from nanomoe.data import pipeline as text_lib
from trainers.writers import png


class Loop(types.SimpleNamespace):
  """Part of a trainer that the callbacks use; keeps the last of each name."""

  def __init__(self):
    super().__init__(step=0, writer=self, images={}, texts={})

  def write_images(self, step, images):
    self.images.update(images)

  def write_texts(self, step, texts):
    self.texts.update(texts)


def plot(labeled, shape):
  """Returns the heat map of a labeled picture; the margins have ink."""
  height, width = shape[:2]
  assert labeled.shape[0] > height and labeled.shape[1] > width
  margin = labeled[:-height], labeled[-height:, :-width]
  assert all((part < 128).any() for part in margin)
  return labeled[-height:, -width:]


def test_labels_are_beside_their_rows_and_above_their_columns():
  """Each label has the ink of its text at the middle of its cell."""
  image = np.full((60, 90, 3), 200, np.uint8)
  labeled = axes.labeled(image, 'title', ['a', 'wide b', 'c'], ['x', 'y', 'z'])
  assert (labeled[-60:, -90:] == 200).all()
  left, top = labeled.shape[1] - 90, labeled.shape[0] - 60
  for i, text in enumerate(['a', 'wide b', 'c']):
    ink = axes._line(text)
    y = top + int(20 * i + 10 - ink.shape[0] / 2)
    found = labeled[y : y + ink.shape[0], : left - axes.GAP, 0]
    np.testing.assert_array_equal(found[:, -ink.shape[1] :], ink)
  for i, text in enumerate('xyz'):
    ink = axes._line(text)
    x = left + int(30 * i + 15 - ink.shape[1] / 2)
    found = labeled[top - axes.GAP - len(ink) : top - axes.GAP, x:, 0]
    np.testing.assert_array_equal(found[:, : ink.shape[1]], ink)


def test_labels_that_overlap_are_left_out_and_wide_ones_are_rotated():
  image = np.zeros((8, 50, 3), np.uint8)
  many = [f'expert {i}' for i in range(100)]
  labeled = axes.labeled(image, 'a', many, ['long label', 'ü 漢'])
  assert labeled.shape[0] > 8 + len('long label') * 5
  assert labeled.shape[0] < 200 and labeled.shape[1] < 150


def test_colors_are_of_what_is_relative():
  blue, white, red, more, gray = colored(np.array([[0, 1, 2, 9, np.nan]]))[0]
  assert white.min() > 240 and (red == more).all()
  assert blue[2] > 150 > blue[0] and red[0] > 150 > red[2]
  assert np.ptp(gray) == 0 and gray[0] < 200


# Loads over time.


def log(history, loop, step, load):
  loop.step = step
  history.on_log(loop, {'train/expert_load': load})


def test_time_goes_to_the_right_in_proportion_to_steps():
  """An expert is idle for 30 steps and has twice its share for 10 more."""
  history, loop = LoadHistory(), Loop()
  history.on_eval_end(loop, 'val', {})
  assert not loop.images  # No log yet.
  log(history, loop, 30, [[0.0, 1.0], [0.5, 0.5]])
  log(history, loop, 40, [[1.0, 0.0], [0.5, 0.5]])
  history.on_eval_end(loop, 'val', {})
  labeled = loop.images['train/load_history']
  image = plot(labeled, history.draw().shape)
  height, width = len(image) // 4, 512
  first = image[height // 2]
  expected = colored(np.array([[0.0, 2.0]]))[0]
  assert (first[: 3 * width // 4] == expected[0]).all()
  assert (first[3 * width // 4 :] == expected[1]).all()
  assert (image[height + height // 2, 0] == expected[1]).all()
  assert (image[2 * height + height // 2] == [247, 247, 247]).all()
  assert (image[2 * height - 1] == 0).all()  # The border of a layer.


def test_a_long_run_is_remembered_evenly_and_resumed_exactly():
  """An expert's load grows from 0 to twice its share in 1000 logs."""
  history, loop, saved = LoadHistory(), Loop(), {}
  for i in range(1000):
    share = i / 999
    log(history, loop, 7 * (i + 1), [[share, 1 - share]])
    if i == 600:
      saved = json.loads(json.dumps(history.state_dict()))
  assert len(history.ends) == len(history.levels) == 128
  assert history.ends[-1] == 7000
  steps = np.diff([0, *history.ends])
  assert steps.max() <= 2 * 7 * 1000 / 128 + 7
  middle = np.array(history.ends) - steps / 2
  np.testing.assert_allclose(
    history.levels[:, 0] / 127, 2 * middle / 7000, atol=0.03
  )
  again = LoadHistory()
  again.load_state_dict(saved)
  for i in range(601, 1000):
    log(again, loop, 7 * (i + 1), [[i / 999, 1 - i / 999]])
  assert again.state_dict() == history.state_dict()
  assert (again.draw() == history.draw()).all()


def test_nothing_was_logged_yet():
  assert LoadHistory().state_dict() == {}


# What is chosen for what.


def test_lift_is_the_quotient_of_two_probabilities(rng):
  counts = rng.integers(0, 5, (2, 3, 7)).astype(float)
  counts[:, :, 4] = 0  # A token that does not occur.
  counts[1, 2] = 0  # A dead expert.
  share = counts.sum(axis=2) / counts.sum(axis=(1, 2))[:, None]
  found = specialization.lift(counts, share[..., None])
  for layer, expert, token in np.ndindex(counts.shape):
    all_of_token = counts[layer, :, token].sum()
    value = found[layer, expert, token]
    if not all_of_token or not share[layer, expert]:
      assert np.isnan(value) if not all_of_token else value == 0
    else:
      p = counts[layer, expert, token] / all_of_token
      assert value == pytest.approx(p / share[layer, expert])


def test_an_expert_s_tokens_are_named_and_red():
  """Expert 0 has all of 'a', 1 all of 'b'; both have 'c'; nobody says 'd'."""
  loop = Loop()
  counts = np.array([[[40.0, 0, 9, 0], [0, 40, 9, 0]]])
  metrics = {'val/token_experts': counts.tolist()}
  metrics['val/expert_load'] = [[0.5, 0.5]]
  Specialization(["'a'", "'b'", "'c'", "'d'"]).on_eval_end(loop, 'val', metrics)
  lines = loop.texts['val/specialization/tokens'].splitlines()
  assert lines[0].split(': ')[1] == "'a' 'b' 'c' 'd'"
  assert lines[1:] == [
    "    layer 0, expert 0, 50.0%: 'a' 2.0",
    "    layer 0, expert 1, 50.0%: 'b' 2.0",
  ]
  lifts = specialization.lift(counts, np.array([[[0.5], [0.5]]]))
  shape = specialization.draw(lifts).shape
  image = plot(loop.images['val/specialization'], shape)
  height, width = len(image) // 2, image.shape[1] // 4
  wanted = colored(np.array([[2, 0, 1, np.nan], [0, 2, 1, np.nan]]))
  cells = image[height // 3 :: height, width // 2 :: width]
  np.testing.assert_array_equal(cells, wanted)


def test_pairs_are_relative_to_chance():
  """Layer 1 chooses as layer 0 does; layer 2 is independent."""
  loop = Loop()
  counts = np.stack([np.zeros((2, 2)), np.diag([30, 10]), np.ones((2, 2))])
  metrics = {'val/first_choices': counts.tolist()}
  CoActivation().on_eval_end(loop, 'val', metrics)
  shape = specialization.draw(counts[1:]).shape
  image = plot(loop.images['val/co_activation'], shape)
  height, width = len(image) // 4, image.shape[1] // 2
  cells = image[height // 3 :: height, width // 2 :: width]
  # 30 of 40 are a share of 3/4: 4/3 of it, where all are.
  wanted = colored(np.array([[4 / 3, 0], [0, 4], [1, 1], [1, 1]]))
  np.testing.assert_array_equal(cells, wanted)


@pytest.mark.parametrize('metrics', [{}, {'val/first_choices': [[[1, 2]]]}])
def test_nothing_is_drawn_without_pairs(metrics):
  loop = Loop()
  CoActivation().on_eval_end(loop, 'val', metrics)
  assert not loop.images


@pytest.mark.parametrize('shape', [(4, 4), (12, 64), (2, 1024), (96, 8)])
def test_bytes_are_few_whatever_the_model(shape, rng):
  """The pictures have 128 columns of independent loads."""
  num_layers, num_experts = shape
  history, loop = LoadHistory(), Loop()
  for step in range(1, 131):
    load = rng.dirichlet(np.ones(num_experts), num_layers)
    log(history, loop, step, load)
  tokens = rng.integers(0, 9, (*shape, 128)).astype(float)
  share = np.full((*shape, 1), 1 / num_experts)
  pairs = rng.random((num_layers, num_experts, num_experts))
  images = [
    history.draw(),
    specialization.draw(specialization.lift(tokens, share)),
    specialization.draw(specialization.pair_lift(pairs)),
  ]
  for image in images[: 2 if num_experts > 512 else 3]:
    assert max(image.shape[:2]) <= 1100
    assert len(png.encode(image)) < 200_000
  assert len(json.dumps(history.state_dict())) < 200_000


# Whose experts are counted.


class Batches:
  """Dataset whose batches have token i i times."""

  fingerprint = ''

  def eval_batches(self, split, rows):
    raise AssertionError('not asked for')

  def train_batch(self, index, rows):
    return {'inputs': np.repeat(np.arange(9), np.arange(9))[None][rows]}


def test_the_most_frequent_tokens_are_watched_in_the_order_of_texts():
  texts = [c.encode() for c in 'ihgfedcba']
  assert text_lib.frequent(Batches(), texts, 9) == [8, 7, 6, 5, 4, 3, 2, 1, 0]
  assert text_lib.frequent(Batches(), texts, 3) == [8, 7, 6]
  assert text_lib.frequent(Batches(), texts[::-1], 3) == [6, 7, 8]
