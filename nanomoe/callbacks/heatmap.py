"""Matrices as pictures: what is large, small and as it should be."""

from jaxtyping import Float, UInt8
import numpy as np

Image = UInt8[np.ndarray, 'height width 3']

# Of what is relative to its fair share: nothing, just that, twice that or more.
COLORS = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]])
NOTHING = np.array([160, 160, 160], np.uint8)  # NaN: there is no share.
LINE = np.array([90, 90, 90], np.uint8)  # Between cells: equal ones are white.
BORDER = np.zeros(3, np.uint8)  # Between panels.
LEVELS = 32  # Of a color, each way: few differ, so that the file is small.
MAX_ROWS = 512  # Of all panels: the time to write grows with the cells.


def colored(relative: Float[np.ndarray, 'rows columns']) -> Image:
  """A pixel each. Blue: 0; white: 1; red: 2 or more; gray: NaN."""
  rounded = np.round(np.nan_to_num(relative) * LEVELS) / LEVELS
  channels = [np.interp(rounded, [0, 1, 2], c) for c in COLORS.T]
  pixels = np.stack(channels, axis=-1).round().astype(np.uint8)
  return np.where(np.isnan(relative)[..., None], NOTHING, pixels)


def grid(
  relative: Float[np.ndarray, 'rows columns'],
  cell: tuple[int, int],
  panel: int = 0,
) -> Image:
  """Cells of (height, width) pixels, with lines between those of 4 and more.

  A border is below each `panel` rows, but the last.
  """
  height, width = cell
  image = colored(relative).repeat(height, axis=0).repeat(width, axis=1)
  if min(cell) >= 4:
    image[height - 1 :: height] = LINE
    image[:, width - 1 :: width] = LINE
  if panel:
    for y in range(panel * height, len(image), panel * height):
      image[y - 2 : y] = BORDER
  return image


def some_layers(num_layers: int, num_experts: int) -> slice:
  """All, or each second, third, ...: MAX_ROWS experts at most, or one layer."""
  return slice(None, None, max(-(-num_layers * num_experts // MAX_ROWS), 1))
