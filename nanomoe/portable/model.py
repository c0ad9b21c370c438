"""A model's weights, written to and read from a directory of transformers."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from nanomoe.config import layers
from nanomoe.config.schema import Config
from nanomoe.model import stack
from nanomoe.portable import classes, config_json, tensor_files, weights
from nanomoe.run import workdir
from trainers.errors import UserError

# Tensors of older versions of transformers that are no weights.
_IGNORED = '.rotary_emb.inv_freq'
_SHOWN = 5  # Names in an error.
# Some files of tied embeddings have the output layer as well.
_INPUT, _OUTPUT = 'model.embed_tokens.weight', 'lm_head.weight'


class Trained(NamedTuple):
  """Trained weights without stacked blocks.

  Attributes:
    arrays: Parameters by path, as of `weights.flatten`, as NumPy arrays.
    bias: Selection biases of the routers, `[layers, experts]`, or None.
  """

  arrays: dict[str, np.ndarray]
  bias: np.ndarray | None

  @property
  def params(self) -> dict[str, Any]:
    """Tree of parameters."""
    return weights.unflatten(self.arrays)


def trained(params: Any, model_state: Any) -> Trained:
  """Returns the weights of a checkpoint.

  Args:
    params: Tree of parameters.
    model_state: State of the model beside its parameters.
  """
  arrays = jax.tree.map(
    lambda x: np.ascontiguousarray(np.asarray(x, np.float32)),
    weights.flatten(params),
  )
  bias = model_state.get('bias')
  return Trained(arrays, None if bias is None else np.asarray(bias))


def unrolled(config: Config) -> Config:
  """Returns a copy of a config whose blocks are not stacked."""
  config = config.copy_and_resolve_references()
  config.model.scan_layers = False
  return config


def write(
  directory: pathlib.Path,
  model: Trained,
  config: Config,
  dtype: str,
  num_tokens: int,
  shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
  """Writes config.json, generation_config.json and the weights.

  Args:
    directory: Existing directory.
    model: Weights.
    config: Config of the run, for which `classes.problems` is empty.
    dtype: Type of the weights in the files, 'float32' or 'bfloat16'.
    num_tokens: Number of tokens of the tokenizer. No later row of the embedding
      is ever drawn.
    shard_bytes: Largest size of a file, unless one weight is larger.
  """
  hf, facts = classes.find(config), classes.facts(config)
  assert hf, 'classes.problems is empty'
  vocab_size = len(model.arrays['token_embedding'])
  workdir.write_json(
    directory / 'config.json', config_json.write(config, vocab_size, dtype)
  )
  generation: dict[str, Any] = {
    'bos_token_id': None,
    'eos_token_id': None,
    'do_sample': True,
  }
  if padding := [*range(num_tokens, vocab_size)]:
    generation['suppress_tokens'] = padding
  workdir.write_json(directory / 'generation_config.json', generation)
  mapped = weights.mapped(model.arrays, model.bias, config, facts, hf)
  zeros = weights.constants(hf, config, facts, model.bias is not None)
  tensor_files.write(
    directory,
    [
      *((m.name, m.to_hf, m.to_hf_shape()) for m in mapped),
      *(
        (name, lambda shape=shape: np.zeros(shape), shape)
        for name, shape in zeros.items()
      ),
    ],
    dtype,
    shard_bytes,
  )


def read(
  directory: pathlib.Path, config: Config, params: Any, has_bias: bool
) -> Trained:
  """Returns the weights in a directory.

  Args:
    directory: Directory with safetensors files.
    config: Config of the model.
    params: Tree of the shapes of its parameters, without stacked blocks.
    has_bias: Whether the routers have selection biases.

  Raises:
    UserError: A line for each weight that is missing, not expected, or of
      another shape or type, or the files are damaged.
  """
  hf, facts = classes.find(config), classes.facts(config)
  assert hf, 'classes.problems is empty'
  try:
    tensors = tensor_files.Tensors(directory, hf, config.moe.num_experts)
  except ValueError as error:
    raise UserError(f'{directory}: {error}') from error
  # A router's noise is not in the files. It starts at zero.
  arrays = {
    path: np.zeros(x.shape, np.float32)
    for path, x in weights.flatten(params).items()
  }
  num_sparse = config.model.num_layers - len(facts.dense)
  shape = num_sparse, config.moe.num_experts
  bias = np.zeros(shape, np.float32) if has_bias else None
  mapped = list(weights.mapped(arrays, bias, config, facts, hf))
  zeros = weights.constants(hf, config, facts, has_bias)
  wanted = {m.name for m in mapped} | set(zeros)
  found = {name for name in tensors.names if not name.endswith(_IGNORED)}
  if config.model.tie_embeddings and _OUTPUT in found - wanted:
    found.discard(_OUTPUT)
    untied = _untied(tensors)
  else:
    untied = []
  lines = [
    *_named('missing', wanted - found),
    *_named('not expected', found - wanted),
    *untied,
  ]
  for m in mapped:
    if not lines or m.name in found:
      lines += _set(m, tensors)
  for name, shape in zeros.items():
    if name in found:
      lines += _not_zero(name, shape, tensors)
  if lines:
    more = len(lines) - 2 * _SHOWN
    lines = lines[: 2 * _SHOWN] + ([f'... and {more} more'] if more > 0 else [])
    raise UserError([f'{directory}: {line}' for line in lines])
  return Trained(arrays, bias)


def _named(problem: str, names: set[str]) -> list[str]:
  lines = [f'the tensor {name} is {problem}' for name in sorted(names)]
  more = len(lines) - _SHOWN
  return lines[:_SHOWN] + (
    [f'{more} more tensors are {problem}'] if more > 0 else []
  )


def _set(mapped: weights.Mapped, tensors: tensor_files.Tensors) -> list[str]:
  try:
    mapped.set(tensors(mapped.name))
  except ValueError as error:
    return [str(error)]
  return []


def _untied(tensors: tensor_files.Tensors) -> list[str]:
  """Returns a line if the output layer of tied embeddings has other weights."""
  try:
    one, other = tensors(_INPUT), tensors(_OUTPUT)
  except (KeyError, ValueError) as error:
    return [f'{_OUTPUT}: it cannot be compared with {_INPUT} ({error})']
  if not np.array_equal(one, other):
    return [
      f'{_OUTPUT}: it differs from {_INPUT}; with tie_word_embeddings=true '
      'both must be equal'
    ]
  return []


def _not_zero(
  name: str, shape: tuple[int, ...], tensors: tensor_files.Tensors
) -> list[str]:
  try:
    value = tensors(name)
  except ValueError as error:
    return [str(error)]
  if value.shape != shape:
    return [f'{name}: its shape is {list(value.shape)}; it must be {[*shape]}']
  if np.any(value):
    return [f'{name}: it is not zero; models of this package have no such part']
  return []


def has_zero_shared(directory: pathlib.Path, config: Config) -> bool:
  """Returns whether every shared expert in a directory is zero.

  Classes that always have a shared expert hold models without one so.

  Args:
    directory: Directory with safetensors files.
    config: Config of the model, with shared experts.

  Raises:
    UserError: The files are damaged.
  """
  hf = classes.find(config)
  assert hf, 'classes.problems is empty'
  try:
    tensors = tensor_files.Tensors(directory, hf, config.moe.num_experts)
    names = [name for name in tensors.names if f'.{hf.shared}.' in name]
    return bool(names) and not any(np.any(tensors(n)) for n in names)
  except ValueError as error:
    raise UserError(f'{directory}: {error}') from error


def restacked(params: dict[str, Any], config: Config) -> dict[str, Any]:
  """Returns parameters with the stacked blocks of a config, if it has any.

  Args:
    params: Tree of parameters without stacked blocks.
    config: Config of the model.
  """
  if not config.model.scan_layers:
    return params
  model, moe = config.model, config.moe
  return stack.stack(
    params,
    *layers.repetition(model.num_layers, moe.first_dense_layers, moe.every),
  )
