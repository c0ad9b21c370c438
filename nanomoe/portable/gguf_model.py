"""A model's weights and metadata, written to and read from a GGUF file."""

from collections.abc import Iterator, Mapping
import itertools
import logging
import pathlib
import re
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from nanomoe.config.schema import Config
from nanomoe.model.norms import EPSILON
from nanomoe.model.positions import THETA
from nanomoe.portable import classes, weights
from nanomoe.portable.model import Trained
from trainers.errors import UserError

# The package logs its progress.
logging.getLogger('gguf').setLevel(logging.WARNING)

# Architecture of llama.cpp by class of transformers.
ARCHITECTURES = {
  'llama': gguf.MODEL_ARCH.LLAMA,
  'qwen3': gguf.MODEL_ARCH.QWEN3,
  'mixtral': gguf.MODEL_ARCH.LLAMA,
  'qwen3_moe': gguf.MODEL_ARCH.QWEN3MOE,
}
MAX_EXPERTS = 512  # LLAMA_MAX_EXPERTS of llama.cpp.
_ROUTERS = 'TopK', 'NoisyTopK', 'Softmax'
_FLOAT32 = gguf.GGMLQuantizationType.F32
_BFLOAT16 = gguf.GGMLQuantizationType.BF16
_TOKENS = {'token_embedding': 0, 'head/kernel': 1}  # Axis of the tokens.


def problems(config: Config) -> list[str]:
  """Returns a line for each key of a model that llama.cpp does not compute.

  The last line names the nearest config of this package.

  Args:
    config: Config of a run.
  """
  reason = 'llama.cpp does not compute it'
  facts, moe = classes.facts(config), config.moe
  router = moe.router.type
  lines = [
    line
    for line in classes.problems(config, reason)[:-1]
    if not line.startswith('moe.router.type=')  # It allows more routers.
  ]
  if facts.router in ('', 'sigmoid'):
    lines.append(
      f'moe.router.type={router!r}: {reason}; it must be one of '
      f'{", ".join(map(repr, _ROUTERS))}'
    )
  if facts.router == 'softmax':
    lines.append(
      'moe.router.renormalize=False: llama.cpp divides the weights by their '
      'sum; it must be True'
    )
  if facts.router != 'none':
    for key, value, needed in (
      ('num_shared', facts.num_shared, 0),
      ('first_dense_layers', facts.first, 0),
      ('every', facts.every, 1),
    ):
      line = f'moe.{key}={value}: {reason}; it must be {needed}'
      is_new = not any(x.startswith(f'moe.{key}=') for x in lines)
      if value != needed and is_new:
        lines.append(line)
    if moe.num_experts > MAX_EXPERTS:
      lines.append(
        f'moe.num_experts={moe.num_experts}: {reason}; it must be at most '
        f'{MAX_EXPERTS}'
      )
  if lines:
    name = 'qwen3_nano' if config.model.qk_norm else 'mixtral_nano'
    lines.append(
      f'the nearest config that can be exported is configs/{name}.py'
    )
  return lines


def architecture(config: Config) -> str:
  """Returns the name of the architecture in llama.cpp."""
  return gguf.MODEL_ARCH_NAMES[_architecture(config)]


def _architecture(config: Config) -> gguf.MODEL_ARCH:
  hf = classes.find(config)
  assert hf, 'problems is empty'
  return ARCHITECTURES[hf.model_type]


def without_padding(
  trained: Trained, config: Config, num_tokens: int
) -> tuple[Trained, Config]:
  """Returns a model without the padding of its vocabulary.

  No sample has such a token, but llama.cpp would draw it.

  Args:
    trained: Weights.
    config: Config of the model.
    num_tokens: Number of tokens of the tokenizer.
  """
  config = config.copy_and_resolve_references()
  config.model.vocab_rows = 0
  kept = {
    path: np.ascontiguousarray(trained.arrays[path].take(range(num_tokens), i))
    for path, i in _TOKENS.items()
    if path in trained.arrays and trained.arrays[path].shape[i] > num_tokens
  }
  return trained._replace(arrays={**trained.arrays, **kept}), config


class _Tensor(NamedTuple):
  """Tensor of a GGUF file.

  Attributes:
    name: Name in the file.
    parts: Part of our parameters, or one for each expert.
    is_stacked: Whether the tensor has an axis of experts.
    num_heads: Number of heads whose rows are reordered; 0 keeps the order.
  """

  name: str
  parts: list[weights.Mapped]
  is_stacked: bool
  num_heads: int

  @property
  def shape(self) -> tuple[int, ...]:
    shape = self.parts[0].to_hf_shape()
    return (len(self.parts), *shape) if self.is_stacked else shape

  def dtype(self, dtype: str) -> gguf.GGMLQuantizationType:
    """Returns the type in a file whose matrices have the type `dtype`."""
    # llama.cpp adds and multiplies vectors in float32 only, and a rounded
    # router would choose other experts.
    is_exact = len(self.shape) == 1 or 'ffn_gate_inp' in self.name
    return _FLOAT32 if is_exact or dtype == 'float32' else _BFLOAT16

  def value(self) -> np.ndarray:
    """Returns the value in the file, as float32."""
    if self.is_stacked:
      return np.stack([part.to_hf() for part in self.parts])
    x = self.parts[0].to_hf()
    if not self.num_heads:
      return x
    # The architecture rotates pairs of neighbours: (0, half), (1, half + 1) ...
    heads = x.reshape(self.num_heads, 2, -1, x.shape[-1])
    return heads.swapaxes(1, 2).reshape(x.shape)

  def set(self, value: np.ndarray) -> None:
    """Writes the parts of a value in a file.

    Raises:
      ValueError: The value has another shape.
    """
    if value.shape != self.shape:
      raise ValueError(
        f'{self.name}: its shape is {[*value.shape]}; it must be '
        f'{[*self.shape]}'
      )
    if self.is_stacked:
      for part, x in zip(self.parts, value, strict=True):
        part.set(x)
      return
    if self.num_heads:
      heads = value.reshape(self.num_heads, -1, 2, value.shape[-1])
      value = heads.swapaxes(1, 2).reshape(value.shape)
    self.parts[0].set(value)


def _tensors(
  arrays: Mapping[str, np.ndarray], config: Config
) -> Iterator[_Tensor]:
  """Yields the tensors of a file, as views of parameters by path."""
  hf, facts = classes.find(config), classes.facts(config)
  assert hf, 'problems is empty'
  model, kind = config.model, _architecture(config)
  num_heads = {
    'attn_q': model.num_heads,
    'attn_k': model.num_kv_heads or model.num_heads,
  }
  names = gguf.get_tensor_name_map(kind, model.num_layers)

  def without_expert(part: weights.Mapped) -> str:
    return re.sub(r'\.experts\.\d+\.', '.experts.', part.name)

  mapped = weights.mapped(arrays, None, config, facts, hf)
  for theirs, parts in itertools.groupby(mapped, without_expert):
    name = names.get_name(theirs, ('.weight',))
    assert name, theirs
    is_rotated = kind is gguf.MODEL_ARCH.LLAMA
    heads = num_heads.get(name.split('.')[-2], 0) if is_rotated else 0
    tensor = _Tensor(name, list(parts), '.experts.' in theirs, heads)
    yield tensor
    if (
      name == 'token_embd.weight'
      and model.tie_embeddings
      and kind is gguf.MODEL_ARCH.QWEN3MOE
    ):  # Some versions have no tied embeddings there.
      yield tensor._replace(name='output.weight')


def fields(config: Config, num_tokens: int, dtype: str) -> dict[str, Any]:
  """Returns the metadata of the model, by key.

  Args:
    config: Config of the run, for which `problems` is empty.
    num_tokens: Number of tokens of the tokenizer.
    dtype: Type of the matrices, 'float32' or 'bfloat16'.
  """
  model, moe, facts = config.model, config.moe, classes.facts(config)
  keys, d_head = gguf.Keys, model.d_model // model.num_heads
  is_dense = facts.router == 'none'
  file_type = gguf.LlamaFileType
  found = {
    keys.General.TYPE: gguf.GGUFType.MODEL,
    keys.General.FILE_TYPE: int(
      file_type.ALL_F32 if dtype == 'float32' else file_type.MOSTLY_BF16
    ),
    keys.LLM.VOCAB_SIZE: num_tokens,
    keys.LLM.CONTEXT_LENGTH: config.block_size,
    keys.LLM.EMBEDDING_LENGTH: model.d_model,
    keys.LLM.BLOCK_COUNT: model.num_layers,
    keys.LLM.FEED_FORWARD_LENGTH: moe.dense_d_ff if is_dense else moe.d_ff,
    keys.Attention.HEAD_COUNT: model.num_heads,
    keys.Attention.HEAD_COUNT_KV: model.num_kv_heads or model.num_heads,
    keys.Attention.KEY_LENGTH: d_head,
    keys.Attention.VALUE_LENGTH: d_head,
    keys.Attention.LAYERNORM_RMS_EPS: EPSILON,
    keys.Rope.DIMENSION_COUNT: d_head,
    keys.Rope.FREQ_BASE: THETA,
  }
  if not is_dense:
    found |= {
      keys.LLM.EXPERT_COUNT: moe.num_experts,
      keys.LLM.EXPERT_USED_COUNT: moe.top_k,
      keys.LLM.EXPERT_FEED_FORWARD_LENGTH: moe.d_ff,
    }
  arch = architecture(config)
  return {key.format(arch=arch): value for key, value in found.items()}


def write(
  path: pathlib.Path,
  model: Trained,
  config: Config,
  metadata: Mapping[str, Any],
  dtype: str,
) -> None:
  """Writes a file, one tensor in memory at a time.

  Args:
    path: File to write.
    model: Weights without padding.
    config: Config of the run, for which `problems` is empty.
    metadata: Metadata by key.
    dtype: Type of the matrices, 'float32' or 'bfloat16'.
  """
  writer = gguf.GGUFWriter(path, architecture(config))
  for key, value in metadata.items():
    _add(writer, key, value)
  tensors = list(_tensors(model.arrays, config))
  for tensor in tensors:
    kind = tensor.dtype(dtype)
    bits = np.dtype(np.float32 if kind == _FLOAT32 else np.uint16)
    num_bytes = int(np.prod(tensor.shape)) * bits.itemsize
    writer.add_tensor_info(tensor.name, tensor.shape, bits, num_bytes, kind)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
      x = np.ascontiguousarray(tensor.value(), np.float32)
      if tensor.dtype(dtype) == _BFLOAT16:
        x = x.astype(ml_dtypes.bfloat16).view(np.uint16)
      writer.write_tensor_data(x)
  finally:
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  add[type(value)](key, value)


def read(
  path: pathlib.Path, config: Config, params: Any, metadata: Mapping[str, Any]
) -> tuple[Trained, dict[str, Any]]:
  """Returns the weights and the metadata in a file.

  Args:
    path: File.
    config: Config of the model, without padding of the vocabulary.
    params: Tree of the shapes of its parameters, without stacked blocks.
    metadata: Metadata that the file must have, by key.

  Raises:
    UserError: A line for each tensor or key that is missing, not expected or
      another one, or the file is damaged.
  """
  try:
    reader = gguf.GGUFReader(path)
  except Exception as error:  # The library raises many classes.
    raise UserError(f'{path}: the file is damaged ({error!r})') from error
  arrays = {
    name: np.zeros(x.shape, np.float32)
    for name, x in weights.flatten(params).items()
  }
  wanted = {tensor.name: tensor for tensor in _tensors(arrays, config)}
  found = {tensor.name: tensor for tensor in reader.tensors}
  lines = [f'the tensor {x} is missing' for x in wanted.keys() - found.keys()]
  lines += [f'the tensor {x} is not expected' for x in found.keys() - wanted]
  for name in wanted.keys() & found.keys():
    try:
      wanted[name].set(_float32(found[name]))
    except ValueError as error:
      lines.append(str(error))
  values = {name: field.contents() for name, field in reader.fields.items()}
  for key, value in metadata.items():
    expected = float(np.float32(value)) if type(value) is float else value
    if values.get(key) != expected:
      lines.append(f'{key} is {values.get(key)!r}; it must be {expected!r}')
  if lines:
    raise UserError([f'{path}: {line}' for line in sorted(lines)])
  return Trained(arrays, None), values


def _float32(tensor: gguf.ReaderTensor) -> np.ndarray:
  """Returns the value of a tensor.

  Raises:
    ValueError: The tensor has another type.
  """
  if tensor.tensor_type == _FLOAT32:
    return np.asarray(tensor.data)
  if tensor.tensor_type == _BFLOAT16:
    return tensor.data.view(ml_dtypes.bfloat16).astype(np.float32)
  raise ValueError(
    f'{tensor.name}: its type is {tensor.tensor_type.name}; it must be F32 or '
    'BF16'
  )


def rounded(model: Trained, config: Config, dtype: str) -> Trained:
  """Returns weights as a file holds them.

  Args:
    model: Weights without padding.
    config: Config of the model.
    dtype: Type of the matrices, 'float32' or 'bfloat16'.
  """
  if dtype == 'float32':
    return model
  arrays = {
    path: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for path, x in model.arrays.items()
    if x.ndim > 1 and 'router' not in path
  }
  return model._replace(arrays={**model.arrays, **arrays})
