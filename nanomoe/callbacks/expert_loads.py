"""Pictures of the loads of all experts, at a step and over time."""

import base64
from typing import Any

from jaxtyping import Float, UInt8
import numpy as np

from nanomoe.callbacks import axes, heatmap
from trainers.callbacks import Callback


class ExpertLoads(Callback):
  """Callback that draws expert_load, layers x experts.

  The picture is drawn at each log and at each evaluation. It shows layers with
  experts; the model must have one.
  """

  def on_log(self, loop, metrics):
    """Draws the loads of training."""
    self._draw(loop, 'train', metrics)

  def on_eval_end(self, loop, split, metrics):
    """Draws the loads of the split."""
    self._draw(loop, split, metrics)

  def _draw(self, loop, split: str, metrics: dict[str, Any]) -> None:
    name = f'{split}/expert_load'
    load = np.asarray(metrics[name])
    image = axes.labeled(
      draw(load),
      f'step {loop.step}: layers by experts; white is a balanced load',
      [f'layer {i}' for i in range(load.shape[0])],
      [f'expert {e}' for e in range(load.shape[1])],
    )
    loop.writer.write_images(loop.step, {name: image})


def draw(load: Float[np.ndarray, 'layers experts']) -> heatmap.Image:
  """Returns a heat map of loads relative to their layer's mean.

  An idle expert is blue, a balanced load white, twice the mean or more red. The
  first layer is on top. The picture is about 480 pixels wide; as PNG it has one
  or two kilobytes, because cells of one color compress well.
  """
  num_layers, num_experts = load.shape
  width = max(480 // num_experts, 4)
  height = min(max(320 // num_layers, 6), width, 48)
  return heatmap.grid(np.nan_to_num(relative(load)), (height, width))


def relative(
  load: Float[np.ndarray, '*layers experts'],
) -> Float[np.ndarray, '*layers experts']:
  """Returns loads over the mean of their layer; NaN if that is 0."""
  mean = np.mean(load, axis=-1, keepdims=True)
  return np.divide(load, mean, where=mean > 0, out=np.full(load.shape, np.nan))


class LoadHistory(Callback):
  """Callback that draws the loads of training over time, at each evaluation.

  Rows are experts, layer by layer. Time runs to the right, from the first step
  to the current one. The history has at most MAX_COLUMNS columns: after that,
  the two neighbours that span the fewest steps are merged into their mean.
  """

  MAX_COLUMNS = 128
  WIDTH = 512  # Pixels.
  NUM_STEPS = 6  # Labels of the axis of time.
  EVEN = 127  # Level of a balanced load; the highest level is twice that.

  def __init__(self):
    self.ends: list[int] = []  # The last step of each column.
    self.levels = np.zeros((0, 0), np.uint8)  # [columns, experts].
    self._num_layers = self._num_experts = 1

  def on_log(self, loop, metrics):
    """Adds the loads since the last log as a column."""
    load = np.asarray(metrics['train/expert_load'])
    self._num_layers, self._num_experts = load.shape
    load = load[heatmap.some_layers(*load.shape)]
    level = np.clip(np.nan_to_num(relative(load)), 0, 2) * self.EVEN
    self._add(loop.step, level.round().astype(np.uint8).reshape(1, -1))

  def _add(self, step: int, level: UInt8[np.ndarray, '1 experts']) -> None:
    """Adds a column that ends at `step`, merging two if there are too many."""
    levels = np.concatenate([self.levels.reshape(-1, level.size), level])
    self.ends.append(step)
    if len(self.ends) > self.MAX_COLUMNS:
      steps = np.diff([0, *self.ends])
      i = int(np.argmin(steps[:-1] + steps[1:]))
      mean = np.average(levels[i : i + 2], axis=0, weights=steps[i : i + 2])
      levels[i + 1] = mean.round()
      levels = np.delete(levels, i, axis=0)
      del self.ends[i]
    self.levels = levels

  def on_eval_end(self, loop, split, metrics):
    """Draws the history, if there is one."""
    if self.ends:
      shape = self._num_layers, self._num_experts
      parts = (np.arange(self.NUM_STEPS) + 0.5) / self.NUM_STEPS
      image = axes.labeled(
        self.draw(),
        f'step {loop.step}: experts by steps; white is a balanced load',
        axes.experts(*shape, heatmap.some_layers(*shape)),
        [f'step {step:.0f}' for step in parts * self.ends[-1]],
      )
      loop.writer.write_images(loop.step, {'train/load_history': image})

  def draw(self) -> heatmap.Image:
    """Returns the history as a heat map; columns are as wide as their steps."""
    steps = (np.arange(self.WIDTH) + 0.5) / self.WIDTH * self.ends[-1]
    columns = np.searchsorted(self.ends, steps)
    share = self.levels[columns].T / self.EVEN
    height = min(max(320 // len(share), 1), 16)
    return heatmap.grid(share, (height, 1), self._num_experts)

  def state_dict(self):
    """Returns the history, with its levels in base64."""
    if not self.ends:
      return {}
    return {
      'ends': self.ends,
      'num_layers': self._num_layers,
      'num_experts': self._num_experts,
      'levels': base64.b64encode(self.levels.tobytes()).decode(),
    }

  def load_state_dict(self, state):
    """Restores the result of `state_dict`."""
    self.ends, self._num_experts = state['ends'], state['num_experts']
    levels = np.frombuffer(base64.b64decode(state['levels']), np.uint8)
    self.levels = levels.reshape(len(self.ends), -1)
    # Checkpoints of older versions lack it; few models have layers left out.
    num_layers = self.levels.shape[1] // self._num_experts
    self._num_layers = state.get('num_layers', num_layers)
