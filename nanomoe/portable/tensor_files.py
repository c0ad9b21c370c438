"""Weights in safetensors files, whole or sharded; the only format read."""

from collections.abc import Callable, Iterable
import json
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from nanomoe.portable.classes import HFClass
from trainers.errors import UserError

ONE = 'model.safetensors'
INDEX = f'{ONE}.index.json'
SHARD_BYTES = 2 * 10**9
DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}
# Types that are read, by their name in the files.
_READ = {'F32', 'BF16', 'F16'}


def write(
  directory: pathlib.Path,
  weights: Iterable[tuple[str, Callable[[], np.ndarray], tuple[int, ...]]],
  dtype: str,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes weights to safetensors files, one shard in memory at a time.

  Selection biases of routers stay float32: rounding would change the experts.

  Args:
    directory: Existing directory.
    weights: Names, functions that return the weights, and shapes.
    dtype: Type in the files, a key of `DTYPES`.
    shard_bytes: Largest size of a file, unless one weight is larger.

  Raises:
    UserError: A file cannot be written.
  """

  def type_of(name: str) -> Any:
    is_bias = name.endswith('e_score_correction_bias')
    return np.float32 if is_bias else DTYPES[dtype]

  shards: list[list[Any]] = [[]]
  size = total = 0
  for name, make, shape in weights:
    num_bytes = int(np.prod(shape)) * np.dtype(type_of(name)).itemsize
    if shards[-1] and size + num_bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append((name, make))
    size, total = size + num_bytes, total + num_bytes
  files = [
    f'model-{i:05}-of-{len(shards):05}.safetensors'
    for i in range(1, len(shards) + 1)
  ]
  if len(shards) == 1:
    files = [ONE]
  for file, shard in zip(files, shards, strict=True):
    arrays = {
      name: np.ascontiguousarray(make(), dtype=type_of(name))
      for name, make in shard
    }
    try:
      save_file(arrays, directory / file, metadata={'format': 'pt'})
    except safetensors.SafetensorError as error:  # A full disk, for example.
      raise UserError(
        f'{directory / file}: the file cannot be written ({error})'
      ) from error
    del arrays
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': total},
      'weight_map': {
        name: file
        for file, shard in zip(files, shards, strict=True)
        for name, _ in shard
      },
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')


class Tensors:
  """Weights in a directory, with the experts of fused weights by name.

  Args:
    directory: Directory of safetensors files.
    hf: Class of the model.
    num_experts: Number of experts in a layer.

  Attributes:
    names: Names of all weights.

  Raises:
    ValueError: There are no intact safetensors files, or the index names a file
      outside of the directory.
  """

  def __init__(self, directory: pathlib.Path, hf: HFClass, num_experts: int):
    self._files = _open(directory)
    # Name: the file, the name in the file, and the index of the part.
    self._places: dict[str, tuple[Any, str, Any]] = {}
    for file in self._files:
      for name in list(file.keys()):
        for alias, index in _aliases(file, name, hf, num_experts):
          if alias in self._places:
            raise ValueError(f'{alias} is in two files')
          self._places[alias] = file, name, index
    self.names = set(self._places)

  def __call__(self, name: str) -> np.ndarray:
    """Returns a weight as float32.

    Raises:
      ValueError: The type of the weight is not one of floating point, or the
        file is damaged.
    """
    file, stored, index = self._places[name]
    view = file.get_slice(stored)
    if view.get_dtype() not in _READ:
      raise ValueError(
        f'{stored}: its type is {view.get_dtype()}; it must be one of '
        f'{", ".join(sorted(_READ))}'
      )
    try:
      array = file.get_tensor(stored) if index is None else view[index]
    except Exception as error:  # The library raises classes of its own.
      raise ValueError(f'{stored}: it cannot be read ({error})') from error
    return np.asarray(array).astype(np.float32)


def _open(directory: pathlib.Path) -> list[Any]:
  paths = [directory / ONE]
  if (directory / INDEX).exists():
    try:
      index = json.loads((directory / INDEX).read_text(encoding='utf-8'))
      names = sorted(set(index['weight_map'].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise ValueError(f'{INDEX} is damaged ({error!r})') from error
    for name in names:
      # A stranger's index must not make this process read other files.
      if not isinstance(name, str) or not re.fullmatch(
        r'[\w.-]+\.safetensors', name
      ):
        raise ValueError(
          f'{INDEX} names the file {name!r}; it must be a safetensors file in '
          'the same directory'
        )
    paths = [directory / name for name in names]
  elif not paths[0].exists():
    found = sorted(p.name for p in directory.glob('*.bin'))
    reason = (
      f'; {found[0]} has pickled weights, which are not read' if found else ''
    )
    raise ValueError(f'there is no {ONE} and no {INDEX}{reason}')
  root = directory.resolve()
  files = []
  for path in paths:
    if not path.resolve().is_relative_to(root) or not path.is_file():
      raise ValueError(
        f'{path.name} is missing or outside of the directory; it must be a '
        'file in it'
      )
    try:
      files.append(safetensors.safe_open(path, framework='numpy'))
    except Exception as error:  # The library raises classes of its own.
      raise ValueError(f'{path.name} is damaged ({error})') from error
  return files


def _aliases(
  file: Any, name: str, hf: HFClass, num_experts: int
) -> Iterable[tuple[str, Any]]:
  """Yields the names of a weight in the table, each with the index of its part.

  Recent versions of transformers fuse the experts of a layer, and call the
  feed-forward layer `mlp` in each class.
  """
  match = re.fullmatch(
    r'(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.'
    r'(experts\.gate_up_proj|experts\.down_proj|gate\..+)',
    name,
  )
  if not match or not hf.has_experts:
    yield name, None
    return
  prefix, kind = f'{match[1]}{hf.experts}', match[2]
  if kind.startswith('gate.'):
    yield f'{prefix}.{kind}', None
    return
  shape = file.get_slice(name).get_shape()
  if len(shape) != 3 or shape[0] != num_experts:
    raise ValueError(
      f'{name}: its shape is {shape}; the first of three axes must be '
      f'{num_experts} experts'
    )
  gate, up, down = hf.projections
  half = shape[1] // 2
  for e in range(num_experts):
    expert = f'{prefix}.experts.{e}'
    if kind == 'experts.down_proj':
      yield f'{expert}.{down}.weight', e
    else:
      yield f'{expert}.{gate}.weight', (e, slice(None, half))
      yield f'{expert}.{up}.weight', (e, slice(half, None))
