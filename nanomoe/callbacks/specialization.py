"""Pictures of the tokens that experts are chosen for, and of co-activation."""

from collections.abc import Sequence

from jaxtyping import Float
import numpy as np

from nanomoe.callbacks import axes, heatmap
from trainers.callbacks import Callback


class Specialization(Callback):
  """Callback that draws experts x tokens of the vocabulary, at each evaluation.

  A cell is the lift `P(expert | token) / P(expert)`: 1 if the expert is chosen
  for this token as often as for all tokens. Rows are experts, layer by layer. A
  token that did not occur is gray. A text lists each expert's most informative
  tokens.

  Args:
    names: Texts of the tokens that the task counts, in their order.
  """

  NUM_NAMED = 12  # Tokens of an expert in the text.

  def __init__(self, names: Sequence[str]):
    self.names = names

  def on_eval_end(self, loop, split, metrics):
    """Writes the picture and the text of the split."""
    counts = np.asarray(metrics[f'{split}/token_experts'])
    share = np.asarray(metrics[f'{split}/expert_load'])
    token_lift = lift(counts, share[..., None])
    name = f'{split}/specialization'
    image = axes.labeled(
      draw(token_lift),
      f'step {loop.step}: experts by tokens; white is lift 1, red 2 or more',
      _experts(token_lift),
      self.names,
    )
    loop.writer.write_images(loop.step, {name: image})
    text = self._text(counts, share, token_lift)
    loop.writer.write_texts(loop.step, {f'{name}/tokens': text})

  def _text(self, counts, share, token_lift) -> str:
    """Returns a line for each expert.

    Lines are indented, because Markdown then keeps line breaks.
    """
    lines = ['columns of the picture: ' + ' '.join(self.names)]
    # Contribution of a token to the mutual information: n ln(lift).
    log_lift = np.log(np.nan_to_num(token_lift, nan=1.0).clip(1e-9))
    information = counts * log_lift  # [layers, experts, tokens]
    for layer, expert in np.ndindex(share.shape):
      own = information[layer, expert]
      best = np.argsort(-own, kind='stable')[: self.NUM_NAMED]
      named = '  '.join(
        f'{self.names[i]} {token_lift[layer, expert, i]:.1f}'
        for i in best
        if own[i] > 0
      )
      lines.append(
        f'layer {layer}, expert {expert}, {share[layer, expert]:.1%}: {named}'
      )
    return ''.join(f'    {line}\n' for line in lines)


class CoActivation(Callback):
  """Callback that draws which first choices occur together, at each evaluation.

  Each layer but the first has a panel: a row for each expert of the layer
  before, a column for each of its own experts. A cell is the lift
  `P(column | row) / P(column)`. Nothing is drawn for a single layer, or if
  experts choose tokens.
  """

  def on_eval_end(self, loop, split, metrics):
    """Draws the split's pairs of first choices."""
    counts = np.asarray(metrics.get(f'{split}/first_choices', []))
    if len(counts) > 1:
      image = axes.labeled(
        draw(pair_lift(counts[1:])),
        f'step {loop.step}: experts by those of the next layer; white is lift '
        '1, red 2 or more',
        _experts(counts[:-1]),
        [f'expert {e}' for e in range(counts.shape[2])],
      )
      loop.writer.write_images(loop.step, {f'{split}/co_activation': image})


def lift(
  counts: Float[np.ndarray, 'layers experts tokens'],
  share: Float[np.ndarray, 'layers experts 1'],
) -> Float[np.ndarray, 'layers experts tokens']:
  """Returns `P(expert | token) / P(expert)`.

  The lift is NaN for a token that does not occur, and 0 for an expert without
  a share.

  Args:
    counts: Number of assignments of each token to each expert.
    share: Share of all assignments of each expert.
  """
  total = counts.sum(axis=1, keepdims=True)
  conditional = np.divide(
    counts, total, where=total > 0, out=np.full(counts.shape, np.nan)
  )
  return np.divide(conditional, share, where=share > 0, out=conditional * 0)


def pair_lift(
  counts: Float[np.ndarray, 'layers experts experts'],
) -> Float[np.ndarray, 'layers experts experts']:
  """Returns `P(column | row) / P(column)` of each layer's pairs."""
  share = counts.sum(axis=1) / counts.sum(axis=(1, 2))[:, None].clip(1)
  by_column = lift(counts.swapaxes(1, 2), share[..., None])
  return by_column.swapaxes(1, 2)


def _experts(values: Float[np.ndarray, 'layers experts columns']) -> list[str]:
  """Returns the names of the rows of `draw(values)`."""
  num_layers, num_experts, _ = values.shape
  every = heatmap.some_layers(num_layers, num_experts)
  return axes.experts(num_layers, num_experts, every)


def draw(
  values: Float[np.ndarray, 'layers experts columns'],
) -> heatmap.Image:
  """Returns a heat map of lifts: 0 is blue, 1 white, 2 or more red."""
  num_layers, num_experts, num_columns = values.shape
  values = values[heatmap.some_layers(num_layers, num_experts)]
  rows = values.reshape(-1, num_columns)
  width = min(max(768 // num_columns, 2), 48)
  height = min(max(384 // len(rows), 1), width, 16)
  return heatmap.grid(rows, (height, width), num_experts)
