"""CLU without TensorFlow.

Importing clu.metric_writers or clu.periodic_actions imports TensorFlow (1.3 GB
installed, 6 s of each start). CLU needs TensorFlow for one name,
clu.metric_writers.summary_writer.SummaryWriter. `install` registers a
replacement of that module, whose writer needs TensorBoard alone.
"""

import os
import sys
import types


class _Module(types.ModuleType):
  def SummaryWriter(self, logdir: str | os.PathLike):
    """Returns a writer of TensorBoard event files in `logdir`.

    The import waits for the call: the class subclasses CLU's interface.
    """
    from trainers.writers.tensorboard import SummaryWriter  # noqa: PLC0415

    return SummaryWriter(logdir)


def install() -> None:
  """Registers the replacement, unless CLU has imported its own module."""
  name = 'clu.metric_writers.summary_writer'
  sys.modules.setdefault(name, _Module(name))
