"""What experts are chosen for, and with which others, as pictures."""

from collections.abc import Sequence

from jaxtyping import Float
import numpy as np

from nanomoe.callbacks import heatmap
from trainers.callbacks import Callback


class Specialization(Callback):
  """Draws, of each evaluation, experts x tokens of the vocabulary, as lift.

  lift = P(expert | token) / P(expert): 1 if the expert is not more for this
  token than for others. Experts are below each other, layer by layer; a token
  that did not occur is gray. And writes, as text, each expert's tokens: those
  that tell most of it.

  Args:
    names: of the tokens that the task counts, in their order.
  """

  NUM_NAMED = 12

  def __init__(self, names: Sequence[str]):
    self.names = names

  def on_eval_end(self, loop, split, metrics):
    counts = np.asarray(metrics[f'{split}/token_experts'])
    share = np.asarray(metrics[f'{split}/expert_load'])
    chosen = lift(counts, share[..., None])
    name = f'{split}/specialization'
    loop.writer.write_images(loop.step, {name: draw(chosen)})
    text = self._text(counts, share, chosen)
    loop.writer.write_texts(loop.step, {f'{name}/tokens': text})

  def _text(self, counts, share, chosen) -> str:
    """A line for each expert; indented: Markdown then leaves lines alone."""
    lines = ['columns of the picture: ' + ' '.join(self.names)]
    # n ln(lift) of a token is what it tells of an expert.
    told = counts * np.log(np.nan_to_num(chosen, nan=1.0).clip(1e-9))
    for layer, expert in np.ndindex(share.shape):
      best = np.argsort(-told[layer, expert], kind='stable')[: self.NUM_NAMED]
      named = '  '.join(
        f'{self.names[i]} {chosen[layer, expert, i]:.1f}'
        for i in best
        if told[layer, expert, i] > 0
      )
      lines.append(
        f'layer {layer}, expert {expert}, {share[layer, expert]:.1%}: {named}'
      )
    return ''.join(f'    {line}\n' for line in lines)


class CoActivation(Callback):
  """Draws, of each evaluation, which first choices go with which, as lift.

  A panel for each layer but the first: a row for each expert of the layer
  before, a column for each of its own.
  lift = P(column | row) / P(column). Where experts choose, and of one layer,
  there is nothing to draw.
  """

  def on_eval_end(self, loop, split, metrics):
    counts = np.asarray(metrics.get(f'{split}/first_choices', []))
    if len(counts) > 1:
      image = draw(with_layer_before(counts[1:]))
      loop.writer.write_images(loop.step, {f'{split}/co_activation': image})


def lift(
  counts: Float[np.ndarray, 'layers experts tokens'],
  share: Float[np.ndarray, 'layers experts 1'],
) -> Float[np.ndarray, 'layers experts tokens']:
  """P(expert | token) / P(expert); NaN where there is no such token.

  Where an expert has no share, it is 0.
  """
  total = counts.sum(axis=1, keepdims=True)
  given = np.divide(
    counts, total, where=total > 0, out=np.full(counts.shape, np.nan)
  )
  return np.divide(given, share, where=share > 0, out=given * 0)


def with_layer_before(
  counts: Float[np.ndarray, 'layers experts experts'],
) -> Float[np.ndarray, 'layers experts experts']:
  """P(column | row) / P(column) of each layer's pairs."""
  share = counts.sum(axis=1) / counts.sum(axis=(1, 2))[:, None].clip(1)
  by_column = lift(counts.swapaxes(1, 2), share[..., None])
  return by_column.swapaxes(1, 2)


def draw(
  chosen: Float[np.ndarray, 'layers experts columns'],
) -> heatmap.Image:
  """Blue: never; white: as often as others; red: twice as often or more."""
  num_layers, num_experts, num_columns = chosen.shape
  chosen = chosen[heatmap.some_layers(num_layers, num_experts)]
  rows = chosen.reshape(-1, num_columns)
  width = min(max(768 // num_columns, 2), 48)
  height = min(max(384 // len(rows), 1), width, 16)
  return heatmap.grid(rows, (height, width), num_experts)
