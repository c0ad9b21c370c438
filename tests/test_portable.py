"""Models in the layout of transformers: names, refusals and damaged files."""

import configparser
import json
import shutil
import subprocess

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from benchmarks import peers
from nanomoe import evaluate as evaluate_lib
from nanomoe import experiment, export, import_hf
from nanomoe.portable import (
  classes,
  config_json,
  importer,
  model,
  tensor_files,
  verify,
)
from tests import exported
from tests.shrunk import ROOT
from trainers.checkpoint import reader
from trainers.errors import UserError

VERIFY = ROOT / 'tests' / 'reference' / 'verify_exports.py'
MIXTRAL = {
  key: value
  for key, value in exported.COMMON.items()
  if key not in ('block_size', 'model.d_model', 'model.num_layers')
}


def _read(directory, case):
  shapes = jax.eval_shape(lambda: case.trained.params)
  return model.read(
    directory, case.config, shapes, case.trained.bias is not None
  )


@pytest.fixture(scope='module', params=exported.CASES)
def written(request, tmp_path_factory):
  directory = tmp_path_factory.mktemp('exported') / request.param
  return request.param, directory, exported.make(request.param, directory)


def test_weights_are_read_back_bitwise(written):
  _, directory, case = written
  found = _read(directory, case)
  assert len(list(directory.glob('*.safetensors'))) > 1  # Sharded.
  for path, x in case.trained.arrays.items():
    if not path.endswith('router/noise'):
      np.testing.assert_array_equal(found.arrays[path], x, err_msg=path)
  if case.trained.bias is not None:
    np.testing.assert_array_equal(found.bias, case.trained.bias)


def test_the_config_is_read_back(written):
  name, directory, _ = written
  values = json.loads((directory / 'config.json').read_text())
  found = config_json.read(values)
  assert values['model_type'] == name.split('-')[0]
  if name.endswith('unshared'):  # The importer looks at the weights.
    assert found.pop('moe.num_shared') in (0, 1)
  kind = found.pop('moe.router.type', 'Softmax')
  assert kind == ('Sigmoid' if name[:4] in ('dots', 'glm4') else 'Softmax')
  again = exported.config_of(exported.CASES[name])
  for key, value in found.items():
    *sections, last = key.split('.')
    section = again
    for part in sections:
      section = section[part]
    expected = section.get(last, value)
    if key == 'model.num_kv_heads':
      expected = expected or again.model.num_heads
    assert value == expected, key


def test_a_zero_shared_expert_is_none(tmp_path):
  for name, expected in (('dots1-unshared', 0), ('glm4_moe', 1)):
    config = exported.make(name, tmp_path / name).config
    config.moe.num_shared = 1  # As config.json says.
    found = importer.without_zero_shared(tmp_path / name, config)
    assert found.moe.num_shared == expected


@pytest.mark.slow
def test_the_comparison_of_an_export_can_fail(tmp_path):
  case = exported.make('mixtral', tmp_path / 'out')
  size, tokens = case.tokenizer.vocab_size, case.tokenizer.encode(exported.TEXT)

  def compare(read):
    verify.same_weights(case.trained, read, np.dtype('float32'))
    model_of_files = verify.reference(case.config, size, read, tokens)
    verify.same_logits(case.trained, model_of_files)

  read = _read(tmp_path / 'out', case)
  compare(read)
  name = 'block_1/moe/w_out'
  changed = {**read.arrays, name: np.nextafter(read.arrays[name], 1)}
  with pytest.raises(UserError, match=name):
    compare(read._replace(arrays=changed))
  # Equal weights that are computed in another way.
  other = verify.reference(case.config, size, read, tokens)
  params = {**other.trained[0], 'token_embedding': np.ones((size, 32))}
  with pytest.raises(UserError, match='logits'):
    verify.same_logits(case.trained, other._replace(trained=(params, {})))
  assert verify.same_tokens(
    tmp_path / 'out', case.tokenizer, exported.TEXT
  ) == len(exported.TEXT)
  path = tmp_path / 'out' / 'tokenizer.json'
  files = json.loads(path.read_text())
  vocabulary = files['model']['vocab']
  for change in (
    {'a': vocabulary['b'], 'b': vocabulary['a']},
    {'a': None},  # The library knows no such character.
  ):
    changed = {k: v for k, v in (vocabulary | change).items() if v is not None}
    files['model']['vocab'] = changed
    path.write_text(json.dumps(files))
    with pytest.raises(UserError, match='tokenizer'):
      verify.same_tokens(tmp_path / 'out', case.tokenizer, exported.TEXT)


@pytest.mark.slow
@pytest.mark.optimized
def test_transformers_computes_the_same(tmp_path):
  """Logits with and without padding, greedy text and token ids."""
  requirements, _ = peers.PEERS['transformers']
  options = configparser.ConfigParser()
  options.read(ROOT / 'setup.cfg')
  ours = options['options']['install_requires'].split('\n')[1:]
  python = peers.python_with('transformers-jax', [*requirements, *ours])
  process = subprocess.run(
    [python, VERIFY, tmp_path / 'out'],
    env={**peers.environment(ours=True)},
    capture_output=True,
    text=True,
    check=True,
  )
  rows = {r['case']: r for r in map(json.loads, process.stdout.splitlines())}
  assert set(rows) == set(exported.CASES)
  for name, row in rows.items():
    assert 'error' not in row, row
    assert row['max_logit_difference'] < 1e-4, row
    assert row['greedy_tokens'] == 200
    assert row['std'] > 0.5, f'the logits of {name} say little'


REFUSED = {
  'model.position': 'learned',
  'model.norm': 'LayerNorm',
  'model.bias': True,
  'model.conv_width': 3,
  'model.max_ngram': 2,
  'model.logit_softcap': 20.0,
  'moe.activation': 'relu2',
  'moe.router.type': 'Hash',
  'moe.dispatch': 'capacity',
  'model.attention.type': 'plug.in.Attention',
  'data.tokenizer.type': 'plug.in.Tokenizer',
}


@pytest.mark.parametrize('key', REFUSED)
def test_an_option_without_a_class_is_one_line(key):
  config = exported.config_of({key: REFUSED[key]})
  line, nearest = classes.problems(config)
  assert line.startswith(f'{key}={REFUSED[key]!r}: ')
  assert 'configs/mixtral_nano.py' in nearest


def test_combinations_without_a_class_are_refused():
  softmax = {'moe.router.type': 'Softmax'}
  for changes, key in (
    ({'model.qk_norm': True, 'moe.num_shared': 1}, 'moe.num_shared=1'),
    ({**softmax, 'moe.router.route_scale': 2.0}, 'moe.router.route_scale=2.0'),
    ({'moe.router.type': 'Sigmoid', 'moe.every': 2}, 'moe.every=2'),
    ({'moe.router.type': 'ExpertChoice'}, "moe.router.type='ExpertChoice'"),
    ({'moe.eval_dispatch': 'capacity'}, "moe.eval_dispatch='capacity'"),
  ):
    line, _ = classes.problems(exported.config_of(changes))
    assert line.startswith(key)
  fine = {'moe.dispatch': 'capacity', 'moe.eval_dispatch': 'dropless'}
  assert not classes.problems(exported.config_of(fine))


def _problems_of(directory, case):
  with pytest.raises(UserError) as error:
    _read(directory, case)
  return error.value.problems


@pytest.fixture
def damaged(tmp_path):
  """A whole export in one file, to be damaged."""
  case = exported.make('mixtral')
  model.write(tmp_path, case.trained, case.config, 'float32', 54)
  file = tmp_path / tensor_files.ONE
  return tmp_path, file, case, safetensors.numpy.load_file(file)


NORM = 'model.norm.weight'


def test_a_missing_a_surplus_and_a_changed_tensor_are_named(damaged):
  directory, file, case, tensors = damaged
  for changes, word in (
    ({NORM: None}, 'missing'),
    ({'model.layers.0.bias': np.ones(3)}, 'not expected'),
    ({NORM: np.ones(31, np.float32)}, '[31]'),
    ({NORM: np.ones(32, np.int32)}, 'I32'),
    ({NORM: np.ones(32, np.float64)}, 'F64'),
  ):
    changed = {k: v for k, v in (tensors | changes).items() if v is not None}
    safetensors.numpy.save_file(changed, file)
    (line,) = _problems_of(directory, case)
    assert str(directory) in line
    assert word in line
    assert next(iter(changes)) in line


def test_an_output_layer_beside_tied_embeddings_must_equal_them(tmp_path):
  case = exported.make('llama')
  model.write(tmp_path, case.trained, case.config, 'float32', 54)
  file = tmp_path / tensor_files.ONE
  tensors = safetensors.numpy.load_file(file)
  embedding = tensors['model.embed_tokens.weight']
  safetensors.numpy.save_file({**tensors, 'lm_head.weight': embedding}, file)
  assert _read(tmp_path, case).arrays
  other = np.nextafter(embedding, 1)
  safetensors.numpy.save_file({**tensors, 'lm_head.weight': other}, file)
  (line,) = _problems_of(tmp_path, case)
  assert 'lm_head.weight: it differs' in line


def test_damaged_files_and_paths_that_escape_are_refused(damaged):
  directory, file, case, _ = damaged
  whole = file.read_bytes()
  for raw in (b'', whole[:100], whole[:-1], b'\xff' * 100):
    file.write_bytes(raw)
    (line,) = _problems_of(directory, case)
    assert 'damaged' in line
  file.write_bytes(whole)
  index = directory / tensor_files.INDEX
  outside = directory.parent / 'outside.safetensors'
  shutil.copy(file, outside)
  for name in (
    '../outside.safetensors',
    str(outside),
    'pytorch_model.bin',
    3,
    'absent.safetensors',
  ):
    index.write_text(json.dumps({'weight_map': {NORM: name}}))
    assert str(name) in _problems_of(directory, case)[0]
  (directory / 'link.safetensors').symlink_to(outside)
  index.write_text(json.dumps({'weight_map': {NORM: 'link.safetensors'}}))
  assert 'outside' in _problems_of(directory, case)[0]
  index.write_text('[')
  assert 'damaged' in _problems_of(directory, case)[0]
  index.unlink()
  file.rename(directory / 'pytorch_model.bin')
  assert 'pickle' in _problems_of(directory, case)[0]


def test_fused_experts_and_bfloat16_are_read(damaged):
  directory, file, case, tensors = damaged
  fused = dict(tensors)
  for i in range(3):
    prefix = f'model.layers.{i}.'

    def of(name, prefix=prefix):
      return np.stack(
        [
          fused.pop(f'{prefix}block_sparse_moe.experts.{e}.{name}.weight')
          for e in range(8)
        ]
      )

    gate_up = np.concatenate([of('w1'), of('w3')], axis=1)
    fused[f'{prefix}mlp.experts.gate_up_proj'] = gate_up
    fused[f'{prefix}mlp.experts.down_proj'] = of('w2')
    router = fused.pop(f'{prefix}block_sparse_moe.gate.weight')
    fused[f'{prefix}mlp.gate.weight'] = router
  safetensors.numpy.save_file(fused, file)
  found = _read(directory, case)
  for path, x in case.trained.arrays.items():
    np.testing.assert_array_equal(found.arrays[path], x, err_msg=path)
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  safetensors.numpy.save_file(half, file)
  found = _read(directory, case)
  for path, x in case.trained.arrays.items():
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found.arrays[path], rounded, err_msg=path)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('auto_map', {'AutoModelForCausalLM': 'evil.py'}),
    ('model_type', 'gpt2'),
    ('hidden_act', 'gelu'),
    ('rms_norm_eps', 1e-5),
    ('rope_theta', 5e5),
    ('rope_scaling', {'type': 'linear', 'factor': 2.0}),
    ('rope_parameters', {'rope_type': 'yarn', 'rope_theta': 10000.0}),
    ('sliding_window', 4096),
    ('layer_types', ['full_attention', 'sliding_attention']),
    ('attention_bias', True),
    ('hidden_size', 33),
    ('hidden_size', '32'),
    ('num_hidden_layers', None),
    ('head_dim', 16),
  ],
)
def test_a_property_of_others_is_refused_by_name(key, value):
  config = exported.config_of({})
  values = config_json.write(config, 54, 'float32')
  assert config_json.read(values)
  with pytest.raises(
    ValueError, match=key.replace('hidden_size', 'hidden|head')
  ):
    config_json.read({**values, key: value})


@pytest.mark.slow
def test_a_run_travels_and_returns(tiny, tmp_path, monkeypatch):
  config = tiny(
    {
      **MIXTRAL,
      'moe.router.type': 'Softmax',
      'moe.router.renormalize': True,
      'sample.num_tokens': 0,
    }
  )
  run, out, again = (tmp_path / name for name in ('run', 'out', 'again'))
  run.mkdir()
  assert experiment.build(config, run).fit() == 'done'
  result = export.export(run, out)
  assert result['class'] == 'MixtralForCausalLM'
  with pytest.raises(UserError, match='exists'):
    export.export(run, out)
  assert not list(tmp_path.glob('*.partial'))

  # A comparison that fails, and a new start after an export that was killed.
  def fail(*_):
    raise UserError('it differs')

  (tmp_path / 'other.partial').mkdir()
  with monkeypatch.context() as patch, pytest.raises(UserError):
    patch.setattr(verify, 'same_tokens', fail)
    export.export(run, tmp_path / 'other')
  assert not list(tmp_path.glob('other*'))
  text = (out / 'README.md').read_text()
  assert 'AutoModelForCausalLM' in text
  changes = [
    ('data.path', config.data.path),
    ('num_train_steps', '2'),
    ('precision', 'float32'),
  ]
  base = str(ROOT / 'configs' / 'base.py')
  imported = import_hf.config_of(out, base, changes)
  import_hf.import_hf(out, again, imported)
  ours, _ = reader.read(run / 'checkpoints', 'best')
  theirs, _ = reader.read(again / 'checkpoints', 'best')
  names = [name for name in ours if name.startswith('state.params')]
  assert names
  for name in names:
    np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
  losses = [
    evaluate_lib.evaluate(d, 'val', 'best')['cross_entropy']
    for d in (run, again)
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)
  trained = experiment.build(imported, again)
  assert trained.fit() == 'done'
  assert trained.step == 2
  # A failed import or export leaves nothing.
  (out / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='model_type'):
    import_hf.config_of(out, base, changes)
