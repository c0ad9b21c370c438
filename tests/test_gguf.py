"""Files for llama.cpp: contents, refusals, and llama.cpp itself."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library

from benchmarks import peers
from configs import base
from nanomoe import experiment, export
from nanomoe.config import overrides
from nanomoe.data.bpe import BPE
from nanomoe.data.tokenizers import Bytes, Characters
from nanomoe.portable import model, verify
from nanomoe.run import workdir as workdir_lib
from nanomoe.sampling import Generator, Sampling
from tests import exported
from tests.shrunk import ROOT, TINY
from trainers.errors import UserError

gguf = pytest.importorskip('gguf')

from nanomoe.portable import gguf_model, gguf_tokenizer  # noqa: E402

# Architecture by row of exported.CASES.
ARCHITECTURES = {
  'mixtral': 'llama',
  'mixtral-noisy-tied': 'llama',
  'qwen3_moe': 'qwen3moe',
  'qwen3_moe-tied': 'qwen3moe',
  'llama': 'llama',
  'qwen3': 'qwen3',
}
TEXT = (
  "the cat, the hat;\n\tWe'll go:   12 7th\r\n\n\0 café e\u0301 漢字 ٣ Ⅷ \u2028"
  '\u00a0x 👩‍👩‍👧 ▁ <unk> </s> <|endoftext|> ĠĊ \ufeff'
)
WORKER = ROOT / 'tests' / 'reference' / 'llama_cpp.py'


def _write(path, name, dtype='float32'):
  """Writes the model of a row; returns it without padding, and the metadata."""
  case = exported.make(name)
  num_tokens = case.tokenizer.vocab_size
  config = case.config.copy_and_resolve_references()
  config.block_size = 256
  trained, config = gguf_model.without_padding(case.trained, config, num_tokens)
  metadata = {
    **gguf_model.fields(config, num_tokens, dtype),
    **gguf_tokenizer.fields(gguf_tokenizer.vocabulary(case.tokenizer)),
  }
  gguf_model.write(path, trained, config, metadata, dtype)
  return case, trained, config, metadata


def _read(path, trained, config, metadata):
  shapes = jax.eval_shape(lambda: trained.params)
  return gguf_model.read(path, config, shapes, metadata)


@pytest.fixture(scope='module', params=ARCHITECTURES)
def written(request, tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  return request.param, path, *_write(path, request.param)


def test_gguf_reads_the_weights(written):
  """Layouts by hand, from the documentation of the architectures."""
  name, path, case, trained, config, _ = written
  reader = gguf.GGUFReader(path)
  found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
  arch = reader.fields['general.architecture'].contents()
  assert arch == ARCHITECTURES[name]
  ours, num_tokens = trained.arrays, case.tokenizer.vocab_size
  np.testing.assert_array_equal(
    found['token_embd.weight'],
    case.trained.arrays['token_embedding'][:num_tokens],
  )
  if not config.model.tie_embeddings:
    head = case.trained.arrays['head/kernel'][:, :num_tokens]
    np.testing.assert_array_equal(found['output.weight'], head.T)
  else:
    assert ('output.weight' in found) == (arch == 'qwen3moe')
  d_head, group = 8, 2
  qkv = ours['block_1/attention/qkv/kernel'].reshape(32, 2, group + 2, d_head)
  q, k = qkv[:, :, :group].reshape(32, 4, d_head), qkv[:, :, group]
  for key, x in (('q', q), ('k', k)):
    rows = found[f'blk.1.attn_{key}.weight'].reshape(-1, d_head, 32)
    for head in range(x.shape[1]):
      for i in range(d_head // 2):
        # Rotated pairs are neighbours, or half a head apart.
        pair = (2 * i, 2 * i + 1) if arch == 'llama' else (i, i + d_head // 2)
        for row, j in zip(pair, (i, i + d_head // 2), strict=True):
          np.testing.assert_array_equal(rows[head, row], x[:, head, j])
  if 'moe' in name or 'mixtral' in name:
    for key, there in (('w_gate', 'gate'), ('w_in', 'up'), ('w_out', 'down')):
      experts = found[f'blk.2.ffn_{there}_exps.weight']
      (mine,) = (x for p, x in ours.items() if p.endswith(f'block_2/moe/{key}'))
      np.testing.assert_array_equal(experts, mine.swapaxes(1, 2))
  assert all(t.tensor_type.name == 'F32' for t in reader.tensors)


def test_weights_are_read_back_bitwise(written, tmp_path):
  name, path, _, trained, config, metadata = written
  found, _ = _read(path, trained, config, metadata)
  for key, x in trained.arrays.items():
    if not key.endswith('router/noise'):
      np.testing.assert_array_equal(found.arrays[key], x, err_msg=key)
  half = tmp_path / 'half.gguf'
  _, _, _, metadata = _write(half, name, 'bfloat16')
  found, _ = _read(half, trained, config, metadata)
  expected = gguf_model.rounded(trained, config, 'bfloat16')
  for key, x in expected.arrays.items():
    if not key.endswith('router/noise'):
      np.testing.assert_array_equal(found.arrays[key], x, err_msg=key)
    is_exact = np.array_equal(x, trained.arrays[key])
    assert is_exact == ('norm' in key or 'router' in key), key
  assert half.stat().st_size < 0.8 * path.stat().st_size


def test_a_difference_is_named(tmp_path):
  path = tmp_path / 'model.gguf'
  _, trained, config, metadata = _write(path, 'mixtral')

  def lines(metadata=metadata, config=config):
    with pytest.raises(UserError) as error:
      _read(path, trained, config, metadata)
    return error.value.problems

  key = 'llama.expert_used_count'
  (line,) = lines({**metadata, key: 1})
  assert key in line
  assert str(path) in line
  tied = config.copy_and_resolve_references()
  tied.model.tie_embeddings = True
  arrays = {k: v for k, v in trained.arrays.items() if k != 'head/kernel'}
  shapes = jax.eval_shape(lambda: model.Trained(arrays, None).params)
  with pytest.raises(UserError, match=r'output\.weight is not expected'):
    gguf_model.read(path, tied, shapes, metadata)
  wider = {**trained.arrays, 'final_norm/scale': np.ones(33, np.float32)}
  shapes = jax.eval_shape(lambda: model.Trained(wider, None).params)
  with pytest.raises(UserError, match=r'output_norm.weight: .*\[33\]'):
    gguf_model.read(path, config, shapes, metadata)
  whole = path.read_bytes()
  for raw in (b'', whole[:100], whole[: len(whole) // 2]):
    path.write_bytes(raw)
    assert 'damaged' in lines()[0]
  # A changed weight is found by the comparison of every export.
  path.write_bytes(whole[:-4] + b'\0\0\0\1')
  found, _ = _read(path, trained, config, metadata)
  with pytest.raises(UserError, match='differs in the files'):
    verify.same_weights(trained, found, np.dtype('float32'))


REFUSED = [
  ({'moe.router.type': 'Softmax'}, 'moe.router.renormalize=False'),
  ({'moe.router.type': 'Sigmoid'}, "moe.router.type='Sigmoid'"),
  ({'moe.router.type': 'Hash'}, "moe.router.type='Hash'"),
  ({'moe.num_shared': 1}, 'moe.num_shared=1'),
  ({'moe.num_shared': 1, 'model.qk_norm': True}, 'moe.num_shared=1'),
  ({'moe.first_dense_layers': 1}, 'moe.first_dense_layers=1'),
  ({'moe.every': 2, 'model.qk_norm': True}, 'moe.every=2'),
  ({'moe.num_experts': 513}, 'moe.num_experts=513'),
  ({'model.position': 'learned'}, "model.position='learned'"),
  ({'model.norm': 'LayerNorm'}, "model.norm='LayerNorm'"),
  ({'model.logit_softcap': 20.0}, 'model.logit_softcap=20.0'),
  ({'moe.dispatch': 'capacity'}, "moe.dispatch='capacity'"),
]


@pytest.mark.parametrize(('changes', 'key'), REFUSED)
def test_an_option_that_llama_cpp_lacks_is_one_line(changes, key):
  line, nearest = gguf_model.problems(exported.config_of(changes))
  assert line.startswith(f'{key}: ')
  assert 'llama.cpp' in line
  assert 'must be' in line or 'set' in line
  name = 'qwen3_nano' if changes.get('model.qk_norm') else 'mixtral_nano'
  assert name in nearest


def test_models_of_the_table_are_not_refused():
  for name in ARCHITECTURES:
    config = exported.config_of(exported.CASES[name])
    assert not gguf_model.problems(config)
    assert gguf_model.architecture(config) == ARCHITECTURES[name]


def _fitted(kind, text=TEXT, **arguments):
  tokenizer = kind(**arguments)
  tokenizer.fit({'train': text * 3})
  return tokenizer


def _fields(tokenizer):
  assert not gguf_tokenizer.problems(tokenizer)
  return gguf_tokenizer.fields(gguf_tokenizer.vocabulary(tokenizer))


ASCII = 'a\\b \n\t\0x7f\x7f <!'


@pytest.mark.parametrize(
  ('tokenizer', 'text', 'kind'),
  [
    (_fitted(Bytes), TEXT, 'rwkv'),
    (_fitted(Characters, ASCII), ASCII, 'rwkv'),
    (_fitted(BPE, vocab_size=256), TEXT, 'rwkv'),
    (_fitted(BPE, vocab_size=330), TEXT, 'gpt2'),
  ],
)
def test_the_file_has_the_tokens_of_the_run(tokenizer, text, kind):
  fields = _fields(tokenizer)
  assert fields['tokenizer.ggml.model'] == kind
  assert len(fields['tokenizer.ggml.tokens']) == tokenizer.vocab_size
  assert len(set(fields['tokenizer.ggml.tokens'])) == tokenizer.vocab_size
  num_tokens = len(tokenizer.encode(text))
  assert gguf_tokenizer.same_tokens(fields, tokenizer, text) == num_tokens
  assert fields['tokenizer.ggml.add_bos_token'] is False
  end = fields.get('tokenizer.ggml.eos_token_id')
  assert (end is None) == (kind == 'rwkv')
  if end is not None:  # No text has it.
    assert tokenizer.token_bytes()[end] == b'\xff'
  # The comparison can fail.
  texts = fields['tokenizer.ggml.tokens']
  i, j = (int(t) for t in tokenizer.encode(text)[:2])
  texts[i], texts[j] = texts[j], texts[i]
  with pytest.raises(UserError, match='token'):
    gguf_tokenizer.same_tokens(fields, tokenizer, text)


def test_a_long_word_in_the_text_is_refused():
  """llama.cpp merges over the place where a learned BPE splits."""
  tokenizer = _fitted(BPE, 'ab' * 300 + TEXT, vocab_size=300)
  fields = _fields(tokenizer)
  with pytest.raises(UserError, match='256'):
    gguf_tokenizer.same_tokens(fields, tokenizer, 'x' + 'ab' * 300)


def _file(tmp_path, *, pre=None, normalizer=None, added='', **settings):
  """Returns a BPE of a tokenizer.json of GPT-2's kind, with changes."""
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {c: i for i, c in enumerate(alphabet)} | {'th': 256}
  vocabulary |= settings.pop('vocabulary', {})
  tokenizer = library.Tokenizer(library.models.BPE(vocabulary, [('t', 'h')]))
  tokenizer.pre_tokenizer = pre or library.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  if normalizer:
    tokenizer.normalizer = normalizer
  if added:
    tokenizer.add_special_tokens([added])
  state = json.loads(tokenizer.to_str())
  for token in settings.pop('without', ''):
    del state['model']['vocab'][token]
  state['model'] |= settings
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(state))
  return _fitted(BPE, 'the path', file=str(path))


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
  pre = library.pre_tokenizers
  assert not gguf_tokenizer.problems(_file(tmp_path))
  bytes_alone = pre.ByteLevel(add_prefix_space=False, use_regex=False)
  for changes, word in (
    ({'added': '<|endoftext|>'}, '<|endoftext|>'),
    ({'vocabulary': {'</s>': 257}}, '</s>'),
    ({'pre': bytes_alone}, 'pre-tokenizer'),
    ({'pre': pre.Sequence([pre.Digits(), bytes_alone])}, 'pre-tokenizer'),
    ({'normalizer': library.normalizers.NFC()}, 'NFC'),
    ({'ignore_merges': True}, 'ignore_merges=True'),
    ({'vocabulary': {'he': 259}}, '257'),
    ({'merges': []}, 'merges'),
    ({'without': 'õö÷øùúûüýþÿÀÁ'}, '0xFF'),
  ):
    lines = gguf_tokenizer.problems(_file(tmp_path, **changes))
    assert any(word in line for line in lines), (changes, lines)
    assert all(x.startswith("data.tokenizer.type='BPE': ") for x in lines)
  (line,) = gguf_tokenizer.problems(_fitted(Characters))
  assert 'ASCII' in line


def test_a_refused_run_writes_nothing(tmp_path):
  """All reasons at once, before the checkpoint is read."""
  run, out = tmp_path / 'run', tmp_path / 'a' / 'out'
  run.mkdir()
  config = exported.config_of(
    {'moe.num_shared': 1, 'model.position': 'learned'}
  )
  workdir_lib.write_json(run / 'config.json', config.to_dict())
  vocabulary = {'characters': 'aé', 'corpus': '', 'corpus_sha256': ''}
  workdir_lib.write_json(run / 'vocabulary.json', vocabulary)
  with pytest.raises(UserError) as error:
    export.export(run, out, format='gguf')
  found = [line.split('=')[0] for line in error.value.problems[:-1]]
  assert found == ['data.tokenizer.type', 'model.position', 'moe.num_shared']
  with pytest.raises(UserError, match='--verify=transformers'):
    export.export(run, out, format='gguf', verify='transformers')
  assert not out.parent.exists()


def _ask(path, prompts, texts=()):
  """Returns greedy continuations by llama.cpp, and the token ids of texts."""
  python = peers.python_with('llama.cpp', ['xllamacpp==2026.10.11549'])
  request = {'prompts': prompts, 'num_tokens': 200, 'texts': list(texts)}
  process = subprocess.run(
    [python, WORKER, path],
    input=json.dumps(request),
    env=peers.environment(ours=False),
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(process.stdout)


def _compare(path, task, trained, prompts, texts=()):
  """Compares greedy tokens and their log probabilities with llama.cpp."""
  answer = _ask(path, prompts, texts)
  generator = Generator(task.logits, trained, 256)
  drawn = generator(prompts, 200, Sampling(temperature=0.0), 0)
  ours = np.stack(list(drawn), axis=1)
  np.testing.assert_array_equal(answer['tokens'], ours)
  for prompt, row, theirs in zip(
    prompts, ours, answer['logprobs'], strict=True
  ):
    window = jnp.array([[*prompt, *row]])
    logits = task.logits(trained, window)[0][0, len(prompt) - 1 : -1]
    logprobs = jax.nn.log_softmax(logits)[np.arange(200), row]
    # A near tie of two experts may change a token, and those after it.
    assert np.median(np.abs(logprobs - np.array(theirs))) < 1e-4
  return answer['ids']


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'qk_norm'), [('Bytes', False), ('BPE', True)])
def test_llama_cpp_continues_as_a_run_does(kind, qk_norm, tmp_path):
  """A trained run, through the command's function."""
  text = '\n'.join(p.read_text() for p in sorted(ROOT.glob('docs/**/*.md')))
  (tmp_path / 'text.txt').write_text(text)
  changes = {
    **TINY,
    **exported.COMMON,
    'model.num_layers': 2,
    'data.path': tmp_path / 'text.txt',
    'data.tokenizer.type': kind,
    'moe.router.type': 'Softmax',
    'moe.router.renormalize': True,
    'model.qk_norm': qk_norm,
    'block_size': 256,
    'num_train_steps': 60,
    'eval_interval': 60,
    'log_interval': 60,
    'sample.every_steps': 60,
    'optimizer.learning_rate': 1e-2,
    'sample.num_tokens': 0,
  }
  if kind == 'BPE':
    changes |= {'data.tokenizer.vocab_size': 400, 'model.vocab_rows': 416}
  config = overrides.apply(
    base.get_config(), [(key, str(value)) for key, value in changes.items()]
  )
  run, out = tmp_path / 'run', tmp_path / 'out'
  run.mkdir()
  assert experiment.build(config, run).fit() == 'done'
  result = export.export(run, out, format='gguf')
  assert result['architecture'] == ('qwen3moe' if qk_norm else 'llama')
  assert sorted(p.name for p in out.iterdir()) == ['README.md', 'model.gguf']
  restored = experiment.restore(config, run, 'best')
  encode = restored.tokenizer.encode
  prompts = [encode(t).tolist() for t in ('The run', '\n\n', text[999:1040])]
  texts = [TEXT, text[:9999]]
  ids = _compare(
    out / 'model.gguf',
    restored.task,
    (restored.params, restored.model_state),
    prompts,
    texts,
  )
  assert ids == [encode(text).tolist() for text in texts]


@pytest.mark.slow
def test_llama_cpp_computes_each_architecture(written):
  _, path, case, trained, config, _ = written
  size = case.tokenizer.vocab_size
  prompts = [case.tokenizer.encode(exported.TEXT[i : i + 9]) for i in (0, 99)]
  reference = verify.reference(config, size, trained, prompts[0])
  _compare(
    path, reference.task, reference.trained, [p.tolist() for p in prompts]
  )
