"""Routing of a text: the experts and the weights of each token, by layer."""

from collections.abc import Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int
import numpy as np

from nanomoe.model.stack import STACKED
from nanomoe.moe.dispatch.capacity import expert_capacity, make_slots
from nanomoe.moe.layer import CHOICES, Choices
from nanomoe.task import LanguageModel
from trainers.errors import UserError


class Trace(NamedTuple):
  """Experts of the tokens of a text in each layer of experts.

  A token has K choices in the order of its router. If experts choose tokens, K
  is the largest number of experts of a token, and the highest weight is first.

  Attributes:
    tokens: Token ids, `int32[tokens]`.
    positions: Position of each token in its window, `int32[tokens]`.
    layers: Index of each layer among all blocks, dense ones included.
    num_experts: Number of experts of a layer, E.
    experts: Experts of each token, `int32[layers, tokens, k]`. The value E
      marks an empty choice, after the others.
    weights: Weights of these experts, `float32[layers, tokens, k]`; 0 for an
      empty choice.
    computed: Whether the dispatch computed each choice, `bool[layers, tokens,
      k]`. False for empty choices, and for those that a capacity dropped.
  """

  tokens: Int[np.ndarray, ' tokens']
  positions: Int[np.ndarray, ' tokens']
  layers: tuple[int, ...]
  num_experts: int
  experts: Int[np.ndarray, 'layers tokens k']
  weights: Float[np.ndarray, 'layers tokens k']
  computed: Bool[np.ndarray, 'layers tokens k']

  @property
  def windows(self) -> Int[np.ndarray, ' tokens']:
    """Returns the number of each token's window, from 0 on."""
    return np.cumsum(self.positions == 0) - 1

  def of_layers(self, indices: Sequence[int]) -> 'Trace':
    """Returns the trace of some layers.

    Args:
      indices: Indices into `layers`.
    """
    i = list(indices)
    return self._replace(
      layers=tuple(self.layers[j] for j in i),
      experts=self.experts[i],
      weights=self.weights[i],
      computed=self.computed[i],
    )


def join(traces: Sequence[Trace]) -> Trace:
  """Returns the trace of several texts, one after the other.

  Args:
    traces: Traces of one model.
  """
  first = traces[0]
  experts, weights, computed = (
    _joined([list(getattr(t, name)) for t in traces], empty)
    for name, empty in _empty(first.num_experts).items()
  )
  return Trace(
    np.concatenate([t.tokens for t in traces]),
    np.concatenate([t.positions for t in traces]),
    first.layers,
    first.num_experts,
    experts,
    weights,
    computed,
  )


def _empty(num_experts: int) -> dict[str, Any]:
  """Returns the value of an empty choice in each array of a trace."""
  return {'experts': num_experts, 'weights': 0.0, 'computed': False}


def trace(
  task: LanguageModel,
  params: Any,
  model_state: Any,
  tokens: Int[np.ndarray, ' tokens'],
  *,
  block_size: int,
  batch_size: int = 8,
  capacity_factor: float | None = None,
) -> Trace:
  """Returns the routing of tokens in evaluation.

  The tokens are cut into consecutive windows of `block_size`, each of which
  starts at position 0. Several windows are a batch. The batch matters if the
  router is not causal, or if the dispatch has a capacity.

  Args:
    task: Task with a `Transformer`.
    params: Parameters of the model.
    model_state: State of the model beside its parameters.
    tokens: Token ids, at least one.
    block_size: Number of tokens in a window.
    batch_size: Largest number of windows in a batch.
    capacity_factor: Factor of the dispatch 'capacity' in evaluation; None for
      a dispatch that drops no choice.

  Returns:
    The routing of each token in each layer of experts.

  Raises:
    UserError: No layer of the model has experts, or there are no tokens.
  """
  if not len(tokens):
    raise UserError('the text has no tokens; it must have at least one')
  layers, num_experts, batches = (), 0, []
  # The capacity depends on the number of rows, with those of padding.
  is_full = capacity_factor is not None
  for inputs, mask in _batches(tokens, block_size, batch_size, is_full):
    load, found = _apply(task, params, model_state, inputs, mask)
    if load is None:
      raise UserError('no layer of the model has experts')
    num_experts = load.shape[-1]
    by_layer = _by_layer(jax.device_get(found), task.model)
    layers = tuple(by_layer)
    is_token = mask.reshape(-1)
    batches.append(
      [
        [x[is_token] for x in _by_token(c, mask.size, num_experts, computed)]
        for c, computed in (
          (c, _computed(c, num_experts, capacity_factor))
          for c in by_layer.values()
        )
      ]
    )
  experts, weights, computed = (
    _joined([[layer[i] for layer in batch] for batch in batches], empty)
    for i, empty in enumerate(_empty(num_experts).values())
  )
  positions = np.arange(len(tokens), dtype=np.int32) % block_size
  return Trace(
    np.asarray(tokens, np.int32),
    positions,
    layers,
    num_experts,
    experts,
    weights,
    computed,
  )


def _batches(
  tokens: np.ndarray, block_size: int, batch_size: int, is_full: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the tokens and the padding mask of each batch of windows.

  Args:
    tokens: Token ids.
    block_size: Number of tokens in a window.
    batch_size: Largest number of windows in a batch.
    is_full: Whether a batch has windows of padding for missing ones.
  """
  num_windows = -(-len(tokens) // block_size)
  shape = batch_size if is_full else min(batch_size, num_windows), block_size
  size = shape[0] * shape[1]
  for start in range(0, len(tokens), size):
    part = np.asarray(tokens[start : start + size], np.int32)
    padding = 0, size - len(part)
    mask = np.pad(np.ones(len(part), bool), padding)
    yield np.pad(part, padding).reshape(shape), mask.reshape(shape)


# Static by identity: the checkpoints of a run share one compiled program.
@functools.partial(jax.jit, static_argnums=0)
def _apply(
  task: LanguageModel,
  params: Any,
  model_state: Any,
  inputs: jax.Array,
  mask: jax.Array,
) -> tuple[jax.Array | None, dict[tuple[str, ...], Choices]]:
  """Returns the loads, and the choices of each `MoE` by its path."""
  output: Any = task.model.apply(
    {'params': params},
    inputs,
    mask,
    bias=model_state.get('bias'),
    train=False,
    mutable=['intermediates'],
  )
  (_, aux, _), variables = output
  sown: Any = flatten_dict(variables.get('intermediates', {}))
  found = {path: x[0] for path, x in sown.items() if path[-1] == CHOICES}
  return aux and aux.load, found


def _by_layer(
  found: Mapping[tuple[str, ...], Choices], model: Any
) -> dict[int, Choices]:
  """Returns the choices by the index of their block, in increasing order.

  Args:
    found: Choices by the path of their module. Those of scanned blocks have a
      leading axis of periods.
    model: The `Transformer`.
  """
  choices = {}
  for path, value in found.items():
    if path[0] != STACKED:
      choices[_index(path[0])] = value
      continue
    for i in range(len(value.expert)):
      layer = model.num_unrolled + i * model.period + _index(path[1])
      choices[layer] = jax.tree.map(lambda x, i=i: x[i], value)
  return dict(sorted(choices.items()))


def _index(name: str) -> int:
  """Returns i of a block's name, `block_i`."""
  return int(name.rpartition('_')[2])


def _computed(
  choices: Choices, num_experts: int, capacity_factor: float | None
) -> Bool[np.ndarray, 'rows k']:
  """Returns whether the dispatch computed each choice of a batch."""
  expert = choices.expert
  if capacity_factor is None:
    return np.asarray(expert < num_experts)
  num_rows = expert_capacity(expert.size, num_experts, capacity_factor)
  slot = make_slots(jnp.asarray(expert), num_experts, num_rows)
  return np.asarray(slot < num_experts * num_rows)


def _by_token(
  choices: Choices,
  num_tokens: int,
  num_experts: int,
  computed: Bool[np.ndarray, 'rows k'],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns experts, weights and `computed` of each token, `[tokens, k]`."""
  expert = np.asarray(choices.expert)
  weight = np.asarray(choices.weight, np.float32)
  if choices.token is None:
    return expert, np.where(expert < num_experts, weight, 0), computed
  token = np.repeat(choices.token, expert.shape[1])
  used = np.flatnonzero(expert.reshape(-1) < num_experts)
  # By token, then by weight: highest first.
  order = used[np.lexsort((-weight.reshape(-1)[used], token[used]))]
  token = token[order]
  rank = np.arange(len(token)) - np.searchsorted(token, token)
  shape = num_tokens, int(rank.max(initial=0)) + 1
  placed = []
  for values, empty in ((expert, num_experts), (weight, 0), (computed, False)):
    array = np.full(shape, empty, values.dtype)
    array[token, rank] = values.reshape(-1)[order]
    placed.append(array)
  return tuple(placed)


def _joined(batches: list[list[np.ndarray]], empty: Any) -> np.ndarray:
  """Returns the arrays of batches and layers as one, `[layers, tokens, k]`.

  Args:
    batches: Array `[tokens, k]` of each layer of each batch; k may differ.
    empty: Value of choices that a narrower array lacks.
  """
  k = max(array.shape[1] for batch in batches for array in batch)

  def widen(array):
    missing = k - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing)), constant_values=empty)

  layers = zip(*batches, strict=True)
  return np.stack([np.concatenate(list(map(widen, x))) for x in layers])
