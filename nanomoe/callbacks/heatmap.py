"""Heat maps: matrices of values relative to a fair share, as images."""

from jaxtyping import Float, UInt8
import numpy as np

Image = UInt8[np.ndarray, 'height width 3']

# Colors of 0, of the fair share, and of twice the fair share or more.
COLORS = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]])
NOTHING = np.array([160, 160, 160], np.uint8)  # Color of NaN.
LINE = np.array([90, 90, 90], np.uint8)  # Color of lines between cells.
BORDER = np.zeros(3, np.uint8)  # Color of borders between panels.
LEVELS = 32  # Shades on each side of white; few shades make small files.
MAX_ROWS = 512  # Rows of all panels; the time to write grows with the cells.


def colored(relative: Float[np.ndarray, 'rows columns']) -> Image:
  """Returns a pixel per value: 0 is blue, 1 white, 2 or more red, NaN gray."""
  rounded = np.round(np.nan_to_num(relative) * LEVELS) / LEVELS
  channels = [np.interp(rounded, [0, 1, 2], c) for c in COLORS.T]
  pixels = np.stack(channels, axis=-1).round().astype(np.uint8)
  return np.where(np.isnan(relative)[..., None], NOTHING, pixels)


def grid(
  relative: Float[np.ndarray, 'rows columns'],
  cell: tuple[int, int],
  panel_rows: int = 0,
) -> Image:
  """Returns a heat map with lines between cells and borders between panels.

  Args:
    relative: Values relative to a fair share.
    cell: Height and width of a cell in pixels. Cells of less than 4 pixels have
      no lines.
    panel_rows: Number of rows of a panel; 0 draws no borders.
  """
  height, width = cell
  image = colored(relative).repeat(height, axis=0).repeat(width, axis=1)
  if min(cell) >= 4:
    image[height - 1 :: height] = LINE
    image[:, width - 1 :: width] = LINE
  if panel_rows:
    panel_height = panel_rows * height
    for y in range(panel_height, len(image), panel_height):
      image[y - 2 : y] = BORDER
  return image


def some_layers(num_layers: int, num_experts: int) -> slice:
  """Returns every n-th layer, so that a picture has at most MAX_ROWS rows.

  The smallest such n is taken. A layer of more than MAX_ROWS experts is drawn
  whole.
  """
  return slice(None, None, max(-(-num_layers * num_experts // MAX_ROWS), 1))
