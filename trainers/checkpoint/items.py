"""Reading the parts of a checkpoint with Orbax."""

import asyncio
from concurrent import futures
import pathlib
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp


class _Finishing:
  """Part of a handler of Orbax that ends all reads before it raises.

  Orbax closes its event loop after the first error, while other arrays are
  being read. Each of those would print a traceback.
  """

  async def deserialize(self, infos, args=None):
    """Reads arrays, as the other base of the class does."""
    before = asyncio.all_tasks()
    try:
      return await super().deserialize(infos, args)  # pyright: ignore
    except Exception:  # Decoders of damaged data raise anything.
      others = asyncio.all_tasks() - before
      await asyncio.gather(*others, return_exceptions=True)
      raise


class _ArrayHandler(_Finishing, ocp.type_handlers.ArrayHandler):
  pass


class _NumpyHandler(_Finishing, ocp.type_handlers.NumpyHandler):
  pass


_HANDLERS = ocp.type_handlers.create_type_handler_registry(
  (np.ndarray, _NumpyHandler()), (jax.Array, _ArrayHandler())
)


def read(directory: pathlib.Path, step: int, name: str, args: Any) -> Any:
  """Reads one part of a checkpoint.

  Args:
    directory: Directory of the checkpoint's directory.
    step: Step of the checkpoint.
    name: Name of the part: 'arrays' or 'meta'.
    args: Arguments of the restoration, of the class that Orbax has for it.

  Raises:
    Exception: The decoder failed on damaged data.
  """
  handler: Any = (
    ocp.JsonCheckpointHandler()
    if name == 'meta'
    else ocp.PyTreeCheckpointHandler(type_handler_registry=_HANDLERS)
  )
  # A process waits for no other one here, so that each may fail.
  path = epath.Path(directory.absolute() / str(step) / name)
  if not _runs_a_loop():
    return handler.restore(path, args=args)
  # A notebook runs an event loop in this thread. Orbax would replace functions
  # of asyncio to run its own loop inside that one.
  with futures.ThreadPoolExecutor(1) as thread:
    return thread.submit(handler.restore, path, args=args).result()


def _runs_a_loop() -> bool:
  """Returns whether this thread runs an event loop."""
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    return False
  return True
