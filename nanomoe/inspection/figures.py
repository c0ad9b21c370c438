"""Figures of a routing as JSON values: the content of the page and its JSON."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from nanomoe.inspection import (
  coactivation,
  labels,
  predictability,
  saturation,
  specialization,
)
from nanomoe.inspection.contexts import contexts
from nanomoe.inspection.labels import Labels
from nanomoe.inspection.trace import Trace
from nanomoe.run.history import Series

# Limits of a figure keep the page below 5 MB, whatever the model.
MAX_LAYERS = 12
MAX_EXPERTS = 64  # Of a layer: those with the highest loads.
MAX_ROWS = 512  # Experts of all layers together.
MAX_TOKENS = 4096  # Of the colored text.
MAX_CHOICES = 4  # Of a token in the colored text.
MAX_COLUMNS = 64  # Of the loads over time.
MAX_STEPS = 24  # Of the saturation.


class Sample(NamedTuple):
  """Texts whose routing is shown.

  Attributes:
    names: Name of each text: its split, or its file.
    text: Index of each token's text, `int32[tokens]`.
    utf8: UTF-8 of each token of the vocabulary.
  """

  names: list[str]
  text: Int[np.ndarray, ' tokens']
  utf8: Sequence[bytes]


def make(
  sample: Sample,
  trace: Trace,
  earlier: Mapping[int, Trace],
  step: int,
  loads: Series | None,
  tokens_per_step: int,
) -> dict[str, Any]:
  """Returns all figures, as JSON values by name.

  Each figure has `layers`, `split` and `num_tokens`. Arrays of layers follow
  `layers`; arrays of experts follow `experts`, which lists them by layer.

  Args:
    sample: Texts of the trace.
    trace: Routing of the tokens by the last checkpoint.
    earlier: Routing by earlier checkpoints, by step.
    step: Step of the last checkpoint.
    loads: Recorded loads of training, `[records, layers, experts]`; None if the
      run has no records.
    tokens_per_step: Number of tokens of a training step.
  """
  num_rows = min(trace.num_experts, MAX_EXPERTS)
  num_layers = min(MAX_LAYERS, MAX_ROWS // num_rows)
  indices = spread(len(trace.layers), num_layers)
  shown = trace.of_layers(indices)
  experts = [_most_loaded(x, trace.num_experts) for x in shown.experts]
  common = {
    'layers': list(shown.layers),
    'experts': [x.tolist() for x in experts],
    'split': ', '.join(sample.names),
    'num_tokens': len(trace.tokens),
  }
  pieces = []
  for i in range(len(sample.names)):  # A text ends within no character.
    own = trace.tokens[sample.text == i].tolist()
    pieces += labels.pieces([sample.utf8[t] for t in own])
  figures = {
    'loads': _loads(shown, experts),
    'text': _text(sample, shown),
    **{
      f'specialization_{kind}': _specialization(shown, found, experts)
      for kind, found in _labels(sample, trace, pieces).items()
    },
    'coactivation': _coactivation(trace, indices, experts),
    'predictability': _predictability(sample, trace, indices),
    'contexts': _contexts(sample, shown, experts, pieces),
  }
  if earlier:
    figures['saturation'] = _saturation(shown, indices, earlier, step)
  figures = {name: {**common, **figure} for name, figure in figures.items()}
  if loads is not None:
    figures['load_history'] = {
      **common,
      'split': 'train',
      **_load_history(loads, indices, experts, tokens_per_step),
    }
  return figures


def spread(count: int, at_most: int) -> list[int]:
  """Returns at most `at_most` of `count` indices, first and last included."""
  if count <= at_most:
    return list(range(count))
  return np.linspace(0, count - 1, at_most).round().astype(int).tolist()


def _most_loaded(
  experts: Int[np.ndarray, 'tokens k'], num_experts: int
) -> Int[np.ndarray, ' shown']:
  """Returns the experts of a layer that are shown, in increasing order."""
  load = np.bincount(experts.ravel(), minlength=num_experts + 1)[:num_experts]
  return np.sort(np.argsort(-load, kind='stable')[:MAX_EXPERTS])


def _loads(trace: Trace, experts: Sequence[np.ndarray]) -> dict[str, Any]:
  is_choice = trace.experts < trace.num_experts
  load = [
    np.bincount(x[c], minlength=trace.num_experts)
    for x, c in zip(trace.experts, is_choice, strict=True)
  ]
  choices = is_choice.sum(axis=(1, 2))  # [layers]
  dropped = choices - trace.computed.sum(axis=(1, 2))
  return {
    'share': [
      _rounded(x[e] / max(x.sum(), 1), 4)
      for x, e in zip(load, experts, strict=True)
    ],
    'num_choices': choices.tolist(),
    # Tokens that no expert chose, and choices that found no room.
    'without_expert': _rounded(1 - is_choice.any(axis=2).mean(axis=1), 4),
    'dropped': _rounded(dropped / choices.clip(1), 4),
  }


def _text(sample: Sample, trace: Trace) -> dict[str, Any]:
  """Returns the beginning of each text with its experts and weights."""
  count = MAX_TOKENS // len(sample.names)
  parts = [
    np.flatnonzero(sample.text == i)[:count] for i in range(len(sample.names))
  ]
  index = np.concatenate(parts)
  texts = []
  for part in parts:
    own = [sample.utf8[t] for t in trace.tokens[part].tolist()]
    # Bytes of an incomplete character have their values as text.
    texts += [
      piece or labels.shown(b)
      for piece, b in zip(labels.pieces(own), own, strict=True)
    ]
  every = trace.experts[:, index] < trace.num_experts  # [layers, tokens, k]
  k = min(trace.experts.shape[2], MAX_CHOICES)
  choices = trace.experts[:, index, :k]
  percent = (100 * trace.weights[:, index, :k]).round().astype(int)
  missing = (choices < trace.num_experts) & ~trace.computed[:, index, :k]
  return {
    'num_tokens': len(index),
    'texts': [
      {'name': name, 'num_tokens': len(part)}
      for name, part in zip(sample.names, parts, strict=True)
    ],
    'pieces': texts,
    'positions': trace.positions[index].tolist(),
    'no_expert': trace.num_experts,
    'choices': choices.tolist(),
    'percent': percent.tolist(),
    # [token, bits]: bit c is set if a capacity dropped the choice c.
    'dropped': [_bits(layer) for layer in missing],
    # Number of choices of each token, if more than are listed.
    'num_choices': every.sum(axis=2).tolist()
    if trace.experts.shape[2] > k
    else None,
  }


def _bits(mask: Bool[np.ndarray, 'tokens k']) -> list[list[int]]:
  """Returns [row, bits] of each row with a True; bit c belongs to column c."""
  bits = mask @ (1 << np.arange(mask.shape[1]))
  rows = np.flatnonzero(bits)
  return np.stack([rows, bits[rows]], axis=1).tolist()


def _labels(
  sample: Sample, trace: Trace, pieces: Sequence[str]
) -> dict[str, Labels]:
  """Returns the sets of labels with at least two labels, by kind."""
  found = {
    'token': labels.of_tokens(trace.tokens, sample.utf8),
    'class': labels.of_classes(trace.tokens, sample.utf8),
    'position': labels.of_positions(trace.positions, trace.windows),
    'speaker': labels.of_speakers(pieces, sample.text),
    'text': labels.of_texts(sample.names, sample.text, trace.windows),
  }
  return {kind: x for kind, x in found.items() if len(x.names) > 1}


def _specialization(
  trace: Trace, found: Labels, experts: Sequence[np.ndarray]
) -> dict[str, Any]:
  result = specialization.specialization(trace, found)
  arrays = result._asdict()
  counts = np.bincount(found.ids[found.ids >= 0], minlength=len(found.names))
  return {
    'num_tokens': int(counts.sum()),
    'labels': found.names,
    'label_tokens': counts.tolist(),
    # Lists of labels for each expert of each layer.
    **{
      name: [
        _rounded(x[e], 2) for x, e in zip(arrays[name], experts, strict=True)
      ]
      for name in ('counts', 'lift', 'low', 'high', 'null_low', 'null_high')
    },
    **{
      name: _rounded(arrays[name], 4)
      for name in ('information', 'null_information', 'p_value')
    },
    'num_permutations': specialization.NUM_PERMUTATIONS,
  }


def _coactivation(
  trace: Trace, indices: Sequence[int], experts: Sequence[np.ndarray]
) -> dict[str, Any]:
  """Returns pairs of a token's experts, and of first choices after a layer."""
  of_token, across, previous = [], [], []
  for n, i in enumerate(indices):
    own = experts[n]
    pairs = coactivation.of_tokens(trace.of_layers([i]))
    of_token.append(_cut(pairs, own, own))
    if i:
      # The layer of experts before may be one that is not shown.
      before = _most_loaded(trace.experts[i - 1], trace.num_experts)
      pairs = coactivation.across_layers(trace.of_layers([i - 1, i]))
      across.append(_cut(pairs, before, own))
      layer = trace.layers[i - 1]
      previous.append({'layer': layer, 'experts': before.tolist()})
    else:
      across.append(None)
      previous.append(None)
  has_pairs = (trace.experts < trace.num_experts).sum(axis=2).max() > 1
  return {
    'of_token': of_token if has_pairs else None,
    'across_layers': across,
    'previous': previous,
  }


def _cut(
  pairs: coactivation.Pairs, rows: np.ndarray, columns: np.ndarray
) -> dict[str, Any]:
  cut = np.ix_(rows, columns)
  return {
    'counts': pairs.counts[0][cut].tolist(),
    'lift': _rounded(pairs.lift[0][cut], 2),
  }


def _predictability(
  sample: Sample, trace: Trace, indices: Sequence[int]
) -> dict[str, Any]:
  found = predictability.predictability(trace, sample.text)
  return {
    'num_held_out': found.num_held_out[list(indices)].tolist(),
    **{
      name: _rounded(np.asarray(getattr(found, name))[list(indices)], 4)
      for name in ('base', 'token', 'position', 'previous')
    },
  }


def _contexts(
  sample: Sample,
  trace: Trace,
  experts: Sequence[np.ndarray],
  pieces: Sequence[str],
) -> dict[str, Any]:
  return {
    'contexts': [
      [
        [
          {**c._asdict(), 'weight': round(c.weight, 4)}
          for c in contexts(trace, layer, expert, pieces, sample.text)
        ]
        for expert in own.tolist()
      ]
      for layer, own in enumerate(experts)
    ]
  }


def _saturation(
  final: Trace,
  indices: Sequence[int],
  earlier: Mapping[int, Trace],
  step: int,
) -> dict[str, Any]:
  steps = sorted(earlier)
  found = [
    saturation.saturation(earlier[s].of_layers(indices), final) for s in steps
  ]
  return {
    'final_step': step,
    'steps': steps,
    # [steps][layers] each.
    'overlap': [_rounded(x.overlap, 4) for x in found],
    'chance': [_rounded(x.chance, 4) for x in found],
  }


def _load_history(
  loads: Series,
  indices: Sequence[int],
  experts: Sequence[np.ndarray],
  tokens_per_step: int,
) -> dict[str, Any]:
  """Returns mean loads of successive records, at most MAX_COLUMNS of them."""
  parts = np.array_split(
    np.arange(len(loads.steps)), min(len(loads.steps), MAX_COLUMNS)
  )
  means = np.stack([loads.values[part].mean(axis=0) for part in parts])
  return {
    'num_tokens': int(loads.steps[-1]) * tokens_per_step,
    'steps': [int(loads.steps[part[-1]]) for part in parts],
    # [layers][columns][experts].
    'share': [
      _rounded(means[:, i, :][:, own], 4)
      for i, own in zip(indices, experts, strict=True)
    ],
  }


def _rounded(values: Any, decimals: int) -> list[Any]:
  return np.round(np.asarray(values, float), decimals).tolist()
