"""Images of metric writers as PNG files."""

from collections.abc import Iterator
import struct
from typing import Any
import zlib

import numpy as np


def pixels(images: Any) -> np.ndarray:
  """Returns images of CLU's interface as uint8 `[N, H, W, C]`.

  Args:
    images: Images `[N, H, W, C]` or `[H, W, C]`, with C = 1 or 3; uint8, or
      floats in [0, 1].
  """
  found = np.asarray(images)
  if found.dtype != np.uint8:
    found = (np.clip(found, 0, 1) * 255).round().astype(np.uint8)
  return found[None] if found.ndim == 3 else found


def encode(pixels: np.ndarray) -> bytes:
  """Returns `pixels`, uint8 `[H, W, C]` with C = 1 or 3, encoded as PNG."""
  height, width, channels = pixels.shape
  color = {1: 0, 3: 2}[channels]

  def chunks() -> Iterator[tuple[bytes, bytes]]:
    yield b'IHDR', struct.pack('>IIBBBBB', width, height, 8, color, 0, 0, 0)
    # PNG prefixes each row with the number of its filter; 0 is no filter.
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    yield b'IDAT', zlib.compress(rows.tobytes())
    yield b'IEND', b''

  return b'\x89PNG\r\n\x1a\n' + b''.join(
    struct.pack('>I', len(data))
    + kind
    + data
    + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks()
  )
