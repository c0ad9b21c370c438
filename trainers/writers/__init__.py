"""Metric writers: TensorBoard, JSON lines and plug-ins.

`Writer`, the base class of plug-ins, is imported on first access. CLU's
interface must not be imported before `clu_without_tensorflow` is installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from trainers.writers.writers import Writer

__all__ = ['Writer']


def __getattr__(name: str) -> Any:
  if name != 'Writer':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from trainers.writers.writers import Writer  # noqa: PLC0415

  return Writer
