"""Atomic writes of small files, and JSON that any tool can read."""

import json
import math
import os
import pathlib
from typing import Any


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces `path` by a file that holds `text`, in one atomic step.

  The encoding is UTF-8. Lone surrogates, which Python makes of paths that are
  not UTF-8, are escaped as in JSON.

  Args:
    path: Path of the file.
    text: Content of the file.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    with open(temporary, 'wb') as f:
      f.write(text.encode(errors='backslashreplace'))
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def jsonable(value: Any) -> Any:
  """Returns `value` as JSON values, with None for NaN and infinities.

  Args:
    value: JSON value that may contain tuples and arrays of NumPy or JAX.
  """
  if hasattr(value, 'tolist'):  # NumPy and JAX arrays have it.
    value = value.tolist()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {k: jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v) for v in value]
  return value


def to_json(value: Any, indent: int | None = None) -> str:
  """Returns `jsonable(value)` as JSON text.

  Args:
    value: Value, as in `jsonable`.
    indent: Spaces of indentation; None writes one line.

  Raises:
    TypeError: JSON cannot hold a part of `value`.
  """
  return json.dumps(
    jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False
  )
