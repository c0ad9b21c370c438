"""Small files that are whole at any moment, and JSON that any tool can read."""

import json
import math
import os
import pathlib
from typing import Any


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces `path` by a file that holds `text`: never by a part of it.

  In UTF-8. What a path that is none decodes to, lone surrogates, is escaped as
  JSON does it.
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
  """`value`, with null for what JSON has no number for."""
  if hasattr(value, 'tolist'):  # Of NumPy or JAX.
    value = value.tolist()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, dict):
    return {k: jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v) for v in value]
  return value


def to_json(value: Any, indent: int | None = None) -> str:
  return json.dumps(
    jsonable(value), indent=indent, allow_nan=False, ensure_ascii=False
  )
