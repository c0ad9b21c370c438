"""Labels of heat maps, drawn with the bitmap font of Pillow."""

from collections.abc import Iterator, Sequence
import functools

from jaxtyping import UInt8
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanomoe.callbacks import heatmap

GAP = 4  # Pixels between labels and the heat map.


def labeled(
  image: heatmap.Image,
  title: str,
  rows: Sequence[str],
  columns: Sequence[str],
) -> UInt8[np.ndarray, 'labeled_height labeled_width 3']:
  """Returns a heat map with a title, and labels on its left and above it.

  The heat map is at the bottom right. A label that would overlap the one before
  is left out. Characters beyond ASCII are escaped.

  Args:
    image: Heat map.
    title: Meaning of rows, columns and colors.
    rows: Labels of equal parts of the height, from the top.
    columns: Labels of equal parts of the width, from the left. All are rotated
      if one of them is wider than its part.
  """
  height, width = image.shape[:2]
  heading, sides = _line(title), [_line(name) for name in rows]
  heads = [_line(name) for name in columns]
  if max(head.shape[1] for head in heads) + GAP > width / len(heads):
    heads = [np.rot90(head) for head in heads]
  left = max(side.shape[1] for side in sides) + GAP
  top = len(heading) + max(len(head) for head in heads) + 2 * GAP
  shape = top + height, max(left + width, heading.shape[1]), 3
  canvas = np.full(shape, 255, np.uint8)
  left = canvas.shape[1] - width
  canvas[top:, left:] = image
  _paste(canvas, heading, 0, 0)
  for head, x in _spaced(heads, width, axis=1):
    _paste(canvas, head, top - GAP - len(head), left + x)
  for side, y in _spaced(sides, height, axis=0):
    _paste(canvas, side, top + y, left - GAP - side.shape[1])
  return canvas


def experts(num_layers: int, num_experts: int, every: slice) -> list[str]:
  """Returns the names of the rows of a picture with a row for each expert.

  Args:
    num_layers: Number of layers of experts.
    num_experts: Number of experts of a layer.
    every: Layers in the picture.
  """
  layers = range(num_layers)[every]
  return [f'layer {i} expert {e}' for i in layers for e in range(num_experts)]


@functools.lru_cache(4096)
def _line(text: str) -> UInt8[np.ndarray, 'height width']:
  """Returns a line of text as levels of gray."""
  text = text.encode('ascii', 'backslashreplace').decode()
  font = ImageFont.load_default_imagefont()
  box = font.getbbox(text)
  line = Image.new('L', (max(int(box[2]), 1), max(int(box[3]), 1)), 255)
  ImageDraw.Draw(line).text((0, 0), text, fill=0, font=font)
  return np.asarray(line)


def _spaced(
  labels: Sequence[np.ndarray], size: int, axis: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Yields the labels that fit, with their first pixel.

  Args:
    labels: Labels of equal parts of an axis of the heat map.
    size: Pixels of the heat map along the axis.
    axis: The axis, 0 or 1.
  """
  free = 0
  for i, label in enumerate(labels):
    length = label.shape[axis]
    center = (i + 0.5) * size / len(labels)
    first = max(min(int(center - length / 2), size - length), 0)
    if first >= free:
      yield label, first
      free = first + length


def _paste(canvas: np.ndarray, label: np.ndarray, y: int, x: int) -> None:
  """Draws a label; the part outside of the canvas is cut off."""
  part = canvas[y : y + label.shape[0], x : x + label.shape[1]]
  part[:] = label[: part.shape[0], : part.shape[1], None]
