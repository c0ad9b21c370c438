"""Kinds of parameters: the one table that says what a parameter is.

A parameter is known by its path, such as `block_0/attention/qkv/kernel`. Weight
decay, Muon, sharding and the number of active parameters all read this table.
Parameters of stacked blocks, such as `blocks/block_0/attention/qkv/kernel`,
have the kind of one block's, whose axes follow an axis of periods.
"""

import dataclasses
import math
import re
from typing import Any, Literal

import jax

from nanomoe.model.stack import STACKED, is_stacked


@dataclasses.dataclass(frozen=True)
class Kind:
  """Row of the table of parameters.

  Attributes:
    pattern: Regular expression that matches whole paths.
    is_matrix: Whether it is a matrix of a linear layer. Weight decay with
      `optimizer.decay_mask=matrices` applies to matrices alone.
    is_hidden: Whether it is a matrix between hidden layers, which Muon
      orthogonalizes.
    active: Part that one token uses: all of it, `top_k` experts along its first
      axis (in a stack, along its second), or one row.
    axes: Axis of the mesh over which each of the last array axes is divided;
      None, or no entry, for axes that are not. See `trainers.mesh.AXES`.
  """

  pattern: str
  is_matrix: bool = False
  is_hidden: bool = False
  active: Literal['all', 'top_k', 'row'] = 'all'
  axes: tuple[str | None, ...] = ()


# Matrices whose columns, or rows, are divided over the tensor axis.
_COLUMNS = 'fsdp', 'tensor'
_ROWS = 'tensor', 'fsdp'
_VOCABULARY = 'fsdp', None

_BLOCK = rf'({STACKED}/)?block_\d+'
_MOE = rf'{_BLOCK}/(feed_forward/)?moe'
_DENSE = rf'{_BLOCK}/feed_forward(/shared)?'
_NORMS = '|'.join(
  [
    'final_norm',
    rf'{_BLOCK}/(attention|feed_forward)_norm',
    rf'{_BLOCK}/attention/(q|k)_norm',
  ]
)

KINDS = (
  Kind(r'(token|position)_embedding', axes=_VOCABULARY),
  Kind(r'ngrams/ngram_\d+_embedding', active='row', axes=_VOCABULARY),
  Kind(rf'({_NORMS})/(scale|bias)'),
  Kind(rf'{_BLOCK}/(attention|feed_forward)_convolution/filter'),
  Kind(rf'{_BLOCK}/attention/qkv/kernel', True, True, axes=_COLUMNS),
  Kind(rf'{_BLOCK}/attention/qkv/bias', axes=('tensor',)),
  Kind(rf'{_BLOCK}/attention/out/kernel', True, True, axes=_ROWS),
  Kind(rf'{_BLOCK}/attention/out/bias'),
  Kind(rf'{_MOE}/router/(kernel|noise)', True, True),
  Kind(rf'{_MOE}/w_(in|gate)', True, True, 'top_k', ('expert', *_COLUMNS)),
  Kind(rf'{_MOE}/w_out', True, True, 'top_k', ('expert', *_ROWS)),
  Kind(rf'{_MOE}/b_in', active='top_k', axes=('expert', 'tensor')),
  Kind(rf'{_MOE}/b_out', active='top_k', axes=('expert', None)),
  Kind(rf'{_DENSE}/w_(in|gate)', True, True, axes=_COLUMNS),
  Kind(rf'{_DENSE}/w_out', True, True, axes=_ROWS),
  Kind(rf'{_DENSE}/b_in', axes=('tensor',)),
  Kind(rf'{_DENSE}/b_out'),
  Kind(r'head/kernel', True, axes=_COLUMNS),
  Kind(r'head/bias', axes=('tensor',)),
)

# Parameters of plug-ins: of a router, of an attention, or of a module that a
# function made without a name, which Linen names after its class.
_PLUG_INS = '|'.join(
  [
    rf'{_BLOCK}/(attention|[A-Z]\w*_\d+)/.+',
    rf'{_MOE}/(router|[A-Z]\w*_\d+)/.+',
  ]
)
PLUG_IN_MATRIX = Kind(_PLUG_INS, True, True, axes=('fsdp', None))
PLUG_IN_OTHER = Kind(_PLUG_INS)
# Names by which a plug-in marks arrays that multiply nothing.
_NO_MATRIX = re.compile(r'b_.*|filter|.*embedding.*')


def kind_of(path: str, num_axes: int) -> Kind:
  """Returns the kind of a parameter.

  A parameter of a plug-in that matches no row of `KINDS` is a hidden matrix if
  it has two axes or more, unless its name contains `embedding`, begins with
  `b_`, or is `filter`.

  Args:
    path: Names from the root to the parameter, joined by '/'.
    num_axes: Number of axes of the parameter, with that of a stack.

  Raises:
    ValueError: No row of `KINDS` matches, or several do.
  """
  rows = [kind for kind in KINDS if re.fullmatch(kind.pattern, path)]
  if not rows and re.fullmatch(_PLUG_INS, path):
    num_axes -= is_stacked(path)
    is_matrix = num_axes >= 2 and not _NO_MATRIX.fullmatch(path.split('/')[-1])
    return PLUG_IN_MATRIX if is_matrix else PLUG_IN_OTHER
  if len(rows) != 1:
    raise ValueError(
      f'parameter {path!r}: {len(rows)} rows of nanomoe.model.parameters.KINDS '
      'match; each parameter needs one'
    )
  return rows[0]


def kinds(params: Any) -> Any:
  """Returns a tree like `params` of each parameter's `Kind`.

  Args:
    params: Parameters, or their shapes.

  Raises:
    ValueError: A parameter has no kind.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: kind_of(_name(path), leaf.ndim), params
  )


def _name(path: Any) -> str:
  """Returns the names of a path of JAX, joined by '/'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Returns the mesh axis over which each axis of a parameter is divided.

  Args:
    path: Names from the root to the parameter, joined by '/'.
    shape: Shape of the parameter.

  Raises:
    ValueError: The parameter has no kind.
  """
  last = kind_of(path, len(shape)).axes
  return (None,) * (len(shape) - len(last)) + last


def matrices(params: Any) -> Any:
  """Returns a tree like `params`: True for the matrices of linear layers."""
  return jax.tree.map(lambda kind: kind.is_matrix, kinds(params))


def hidden_matrices(params: Any) -> Any:
  """Returns a tree like `params`: True for matrices between hidden layers."""
  return jax.tree.map(lambda kind: kind.is_hidden, kinds(params))


def count(params: Any, top_k: int) -> dict[str, int]:
  """Returns the number of parameters, and of those active for one token.

  Args:
    params: Parameters, or their shapes.
    top_k: Number of experts for a token.

  Returns:
    `num_params` and `num_active_params`.

  Raises:
    ValueError: A parameter has no kind.
  """
  num_params = num_active = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = _name(path)
    kind, num_params = kind_of(name, leaf.ndim), num_params + leaf.size
    if is_stacked(name):
      of_one = _num_active(kind, leaf.shape[1:], top_k)
      num_active += leaf.shape[0] * of_one
    else:
      num_active += _num_active(kind, leaf.shape, top_k)
  return {'num_params': num_params, 'num_active_params': num_active}


def _num_active(kind: Kind, shape: tuple[int, ...], top_k: int) -> int:
  """Returns the number of elements that one token uses."""
  if kind.active == 'top_k':
    return top_k * math.prod(shape[1:])
  if kind.active == 'row':
    return shape[-1]
  return math.prod(shape)
