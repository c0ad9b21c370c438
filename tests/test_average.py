"""The average of the weights: what it is, who uses it, that it is resumed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import Rows, bits, host, make_trainer, mean_square
from test_trainer import At

from configs import base
from nanomoe import evaluate as evaluate_lib
from nanomoe import experiment
from nanomoe import generate as generate_lib
from nanomoe.config import overrides as config_lib
from nanomoe.config import resume
from nanomoe.data import pipeline as text_lib
from nanomoe.run import workdir as workdir_lib
from nanomoe.sampling import Generator, Sampling
from tests.shrunk import TINY
from trainers.callbacks import Callback
from trainers.checkpoint import arrays as arrays_lib
from trainers.checkpoint import reader
from trainers.errors import UserError
from trainers.evaluator import Evaluator
from trainers.state import TrainState

DECAY = 0.3


def test_follows_the_accepted_updates():
  """The third is refused; 0.3 is less than (1 + t) / (10 + t) from t = 3 on."""
  states = []
  make_trainer(
    dataset=Rows({2: np.nan}),
    optimizer=optax.sgd(0.0),
    num_train_steps=1,
    ema_decay=DECAY,
    callbacks=[At(lambda loop: states.append(host(loop.state)), 1)],
  ).fit()
  first = states.pop()
  for key, w in first.params.items():  # It stood still.
    np.testing.assert_allclose(first.average[key], w, rtol=1e-6)
  make_trainer(
    dataset=Rows({2: np.nan}),
    num_train_steps=7,
    ema_decay=DECAY,
    callbacks=[At(lambda loop: states.append(host(loop.state)), *range(9))],
  ).fit()
  average = first.params['w'].astype(np.float64)  # As all runs of seed 0 begin.
  num_updates = 0
  for before, state in zip([None, *states], states, strict=False):
    if int(state.skipped) == (int(before.skipped) if before else 0):
      d = min(DECAY, (1 + num_updates) / (10 + num_updates))
      average = d * average + (1 - d) * state.params['w']
      num_updates += 1
    else:
      assert bits(state.average) == bits(before.average)
    np.testing.assert_allclose(state.average['w'], average, rtol=1e-6)
  assert num_updates == 6


@pytest.mark.slow
def test_evaluations_use_what_they_are_told_to():
  found = {}
  for weights in ('params', 'average'):

    def evaluate(loop, weights=weights):
      state = host(loop.state)
      found[weights] = state, loop.evaluate('val')['val/mse']

    make_trainer(
      num_train_steps=3,
      ema_decay=0.9,
      eval_weights=weights,
      callbacks=[At(evaluate, 3)],
    ).fit()
  batches = [Rows().batch(1000 + i) for i in range(3)]
  assert bits(found['params'][0]) == bits(found['average'][0])
  for weights, (state, mse) in found.items():
    wanted = mean_square(getattr(state, weights), batches)
    assert mse == pytest.approx(wanted, rel=1e-5)
  assert found['params'][1] != pytest.approx(found['average'][1], rel=1e-3)


def test_it_shares_no_buffer_with_the_parameters():
  """Of what is given: the state is donated, and nothing can be twice."""
  params = {'w': jnp.ones(3)}
  state = TrainState.create(params, {}, optax.sgd(0.1), average=True)
  double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), donate_argnums=0)
  assert double(state).average['w'][0] == 2


def test_none_is_kept_unless_asked_for():
  trainer = make_trainer(num_train_steps=1)
  trainer.fit()
  assert trainer.state.average is None
  with pytest.raises(ValueError, match=r"eval_weights='average'.*ema_decay"):
    make_trainer(eval_weights='average')


# Language models.


@pytest.fixture(scope='module')
def averaged(tmp_path_factory, corpus):
  """A finished run that evaluates the average: its config, and directory."""
  directory = tmp_path_factory.mktemp('averaged')
  values = {
    **TINY,
    'data.path': corpus,
    'model.num_layers': 1,
    'eval_iters': 0,
    'eval_weights': 'average',
    'optimizer.type': 'Muon',
    'optimizer.muon_beta': 0.9,
    'optimizer.learning_rate': 0.03,
    'optimizer.ema_decay': 0.9,
    'sample.num_tokens': 400,
    'sample.temperature': 1.0,
  }
  overrides = [(key, str(value)) for key, value in values.items()]
  config = config_lib.apply(base.get_config(), overrides)
  config = experiment.resolve_auto(config)
  assert experiment.build(config, directory).fit() == 'done'
  return config, directory


@pytest.fixture(scope='module')
def by_hand(averaged, corpus):
  """{weights: (cross-entropy, text)} of the last checkpoint."""
  config, directory = averaged
  run = experiment.restore(config, directory, 'latest')
  arrays, _ = reader.read(directory / 'checkpoints', 'latest')
  _, _, dataset = text_lib.read(config, directory)
  batches = list(dataset.eval_batches('val', slice(0, config.batch_size)))
  prompt = run.tokenizer.encode(corpus.read_text()[:1]).tolist()
  evaluator, found = Evaluator(run.task), {}
  for weights in ('params', 'average'):
    params = arrays_lib.subtree(arrays, f'state.{weights}', run.params)
    loss = evaluator(params, run.model_state, batches)['cross_entropy']
    trained = params, run.model_state
    generator = Generator(run.task.logits, trained, config.block_size)
    drawn = np.concatenate(list(generator([prompt], 400, Sampling(1.0), 0)))
    found[weights] = loss, run.tokenizer.decode(drawn)
  assert found['params'][0] != pytest.approx(found['average'][0], rel=1e-4)
  assert found['params'][1] != found['average'][1]
  return found


@pytest.mark.slow
def test_a_run_evaluates_keeps_and_samples_by_it(averaged, by_hand):
  """And its best checkpoint is the best of the average's."""
  _, directory = averaged
  lines = (directory / 'metrics.jsonl').read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  name = 'val/cross_entropy'
  losses = {x['step']: x[name] for x in logged if name in x}
  loss, text = by_hand['average']
  assert losses[12] == pytest.approx(loss, rel=1e-6)
  assert (directory / 'sample.txt').read_text() == text
  result = json.loads((directory / 'result.json').read_text())
  assert result['best_step'] == min(losses, key=lambda step: losses[step])


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['average', 'params'])
def test_the_commands_use_what_the_config_says(
  averaged, by_hand, corpus, tmp_path, weights
):
  directory = shutil.copytree(averaged[1], tmp_path / 'run')
  reader = json.loads((directory / 'config.json').read_text())
  workdir_lib.write_json(
    directory / 'config.json', {**reader, 'eval_weights': weights}
  )
  loss, text = by_hand[weights]
  result = evaluate_lib.evaluate(directory, 'val', 'latest')
  assert result['weights'] == weights
  assert result['cross_entropy'] == pytest.approx(loss, rel=1e-6)
  pieces = generate_lib.generate(
    directory,
    [corpus.read_text()[:1]],
    num_tokens=400,
    temperature=1.0,
    step='latest',
  )
  assert ''.join(piece for (piece,) in pieces) == text


@pytest.mark.slow
def test_another_run_starts_from_what_this_one_evaluates(averaged, tmp_path):
  config, directory = averaged
  config = config.copy_and_resolve_references()
  config.init_from, config.num_train_steps = str(directory), 1
  config.sample.num_tokens = 0
  trainer = experiment.build(config, tmp_path)
  began = []

  class Beginning(Callback):
    def on_fit_start(self, loop):
      began.append(host(loop.state))

  trainer.callbacks.append(Beginning())
  assert trainer.fit() == 'done'
  theirs = experiment.restore(*averaged, 'best').params
  assert bits(began[0].params) == bits(host(theirs))
  assert bits(began[0].average) == bits(host(theirs))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_exactly(averaged, tmp_path):
  """With Muon's momentum, and the average."""
  config, directory = averaged
  first = experiment.build(config, tmp_path)
  first.callbacks.append(At(lambda loop: loop.stop('a pause'), 5))
  assert first.fit() == 'done'
  assert first.step == 5
  assert experiment.build(config, tmp_path).fit() == 'done'
  ours, theirs = (
    reader.read(d / 'checkpoints', 'latest')[0] for d in (tmp_path, directory)
  )
  assert any(name.startswith('state.average.') for name in theirs)
  assert bits(ours) == bits(theirs)


def test_there_must_be_one(tiny):
  with pytest.raises(UserError) as error:
    tiny({'eval_weights': 'average'})
  (line,) = error.value.problems
  assert "eval_weights='average'" in line
  assert 'optimizer.ema_decay' in line


@pytest.mark.parametrize('decay', [0.0, 0.5])
def test_a_run_keeps_the_decay_that_it_has(tiny, decay):
  old, new = tiny({'optimizer.ema_decay': 0.9}), tiny()
  new.optimizer.ema_decay = decay
  with pytest.raises(UserError, match=r'^optimizer\.ema_decay was 0\.9'):
    resume.resume_config(old, new, ['optimizer.ema_decay'])


def test_what_is_evaluated_changes_only_by_name(tiny):
  """It changes which checkpoint is the best."""
  old = tiny({'optimizer.ema_decay': 0.9})
  new = tiny({'optimizer.ema_decay': 0.9, 'eval_weights': 'average'})
  with pytest.raises(UserError, match=r'--config\.eval_weights'):
    resume.resume_config(old, new, [])
  got = resume.resume_config(old, new, ['eval_weights'])
  assert got.eval_weights == 'average'
