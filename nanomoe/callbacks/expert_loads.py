"""The loads of all experts as one picture."""

from typing import Any

from jaxtyping import Float, UInt8
import numpy as np

from trainers.callbacks import Callback

# Of a load in units of the mean: none, equal, twice or more.
COLORS = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]])
LINE = np.array([90, 90, 90], np.uint8)  # Between cells: equal loads are white.


class ExpertLoads(Callback):
  """Draws expert_load of each log and evaluation: layers x experts.

  Of layers that have experts; there must be one.
  """

  def on_log(self, loop, metrics):
    self._draw(loop, 'train', metrics)

  def on_eval_end(self, loop, split, metrics):
    self._draw(loop, split, metrics)

  def _draw(self, loop, split: str, metrics: dict[str, Any]) -> None:
    name = f'{split}/expert_load'
    image = draw(np.asarray(metrics[name]))
    loop.writer.write_images(loop.step, {name: image})


def draw(
  load: Float[np.ndarray, 'layers experts'],
) -> UInt8[np.ndarray, 'height width 3']:
  """Blue: idle; white: the mean of its layer; red: twice that or more.

  The first layer is on top. A kilobyte or two, as PNG, and about 480 pixels
  wide: what is the same all over a cell costs next to nothing.
  """
  num_layers, num_experts = load.shape
  relative = np.nan_to_num(load / load.mean(axis=1, keepdims=True), nan=0.0)
  channels = [np.interp(relative, [0, 1, 2], c) for c in COLORS.T]
  cells = np.stack(channels, axis=-1).round().astype(np.uint8)
  width = max(480 // num_experts, 4)
  height = min(max(320 // num_layers, 6), width, 48)
  image = cells.repeat(height, axis=0).repeat(width, axis=1)
  image[height - 1 :: height] = LINE
  image[:, width - 1 :: width] = LINE
  return image
